"""What error messages are made of: values shown short, foreign messages on one line, types checked."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path


def shorten(value: object, limit: int = 40) -> str:
    """A value as a message can show it."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def one_line(error: object, limit: int = 400) -> str:
    """A foreign message on one line, cut off where it gets long; an exception without words is called by its name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


@contextmanager
def located(where: str) -> Iterator[None]:
    """Begin the message of a `ValueError` with where it happened, such as a file's line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error.__cause__


def and_more(items: Sequence[object]) -> str:
    """What follows the first of several in a message that names only that."""
    return f", and {len(items) - 1} more" if len(items) > 1 else ""


def is_missing_path(name: str) -> bool:
    """Whether this can only be meant as a path, not as a name on a hub, and nothing is there."""
    return (name.startswith((".", "/", "~")) or name.count("/") > 1) and not os.path.exists(name)


def check_type(argument: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Refuse a value of another type, and a truth value where a number is expected.

    Raises:
        TypeError: The message names the argument, what came and what was expected.
    """
    number = kind in (Integral, Real)
    if not isinstance(value, kind) or (number and isinstance(value, bool)):
        raise TypeError(f"`{argument}` is {shorten(value)} of type {type(value).__name__}, expected {expected}.")


def check_integers(**arguments: object) -> None:
    """Refuse what is neither a whole number nor None.

    Raises:
        TypeError: As `check_type`.
    """
    for argument, value in arguments.items():
        if value is not None:
            check_type(argument, value, Integral, "a whole number")


def path_from_here(path: Path) -> Path:
    """A path as a user would type it: from here, if it is below."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
