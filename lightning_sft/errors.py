"""Errors that the user can mend, and what their messages are made of."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class SettingsError(ValueError):
    """A setting or input of the user does not work; the message says what to use instead.

    The command line shows the message in one line. Any other exception is a bug in this package, or in a function that
    the user wrote, and keeps its traceback.
    """


class SettingsTypeError(SettingsError, TypeError):
    """An argument has the wrong type."""


class MissingFileError(SettingsError, FileNotFoundError):
    """A file that the user has named is not there."""


class MissingPackageError(SettingsError, ImportError):
    """A setting needs a package that is not installed; the message says how to install it."""


def shorten(value: object, limit: int = 40) -> str:
    """A value as a message can show it, on one line."""
    text = repr(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= limit else text[:limit] + "..."


def one_line(error: object, limit: int = 400) -> str:
    """A foreign message on one line, cut off where it gets long; an exception without words is called by its name."""
    if isinstance(error, RecursionError):  # which each version of Python words in another way
        return "too deeply nested (RecursionError)"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


@contextmanager
def located(location: str) -> Iterator[None]:
    """Begin the message of a `SettingsError` with its location in the data, such as a file's line."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{location}: {error}") from error.__cause__


def counted(number: int, noun: str, plural: str = "s") -> str:
    """A number with its noun, such as `2 tokens`."""
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def and_more(items: Sequence[object]) -> str:
    """The end of a message that names the first of several items only: how many others there are, if any."""
    return f", and {len(items) - 1} more" if len(items) > 1 else ""


def is_missing_path(name: str) -> bool:
    """Whether this can only be meant as a path, not as a name on a hub, and nothing is there."""
    return (name.startswith((".", "/", "~")) or name.count("/") > 1) and not os.path.exists(name)


def why_not_written(folder: Path) -> str | None:
    """Why a folder cannot be made or written to, as far as can be told beforehand; None if it perhaps can."""
    folder = folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} may not be written"


def path_from_here(path: Path) -> Path:
    """A path as a user would type it: from here, if it is below."""
    path, here = path.absolute(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
