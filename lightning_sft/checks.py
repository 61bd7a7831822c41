"""Arguments of the wrong type or out of range: refused by name, in the same words everywhere.

All functions take the name of an argument and the value that came, most of them also what is expected, in words. With
`optional` None will do, too. They raise `SettingsTypeError` for another type, and `SettingsError` for what is out of
range.
"""

import math
import re
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, get_args

from lightning_sft.errors import SettingsError, SettingsTypeError, shorten


def check_type(
    argument: str, value: object, kind: type | tuple[type, ...], expected: str, *, optional: bool = False
) -> None:
    """Refuse a value of another type."""
    if optional and value is None:
        return
    number = kind in (Integral, Real)
    if not isinstance(value, kind) or (number and isinstance(value, bool)):  # True is no number here
        raise SettingsTypeError(
            f"`{argument}` is {shorten(value)} of type {type(value).__name__}, expected {expected}."
        )


def check_integer(argument: str, value: object, at_least: int | None = None, *, optional: bool = False) -> None:
    """Refuse what is no whole number, or one below `at_least`."""
    check_type(argument, value, Integral, "a whole number", optional=optional)
    if value is not None and at_least is not None and value < at_least:  # type: ignore[operator]
        raise SettingsError(f"`{argument}` is {value}, expected at least {at_least}.")


def check_number(
    argument: str,
    value: object,
    expected: str,
    fits: Callable[[Any], bool] = math.isfinite,
    *,
    optional: bool = False,
) -> None:
    """Refuse what is no number, or does not fit. `fits` is never asked about NaN, which never does."""
    check_type(argument, value, Real, expected, optional=optional)
    if value is not None and (math.isnan(value) or not fits(value)):  # type: ignore[arg-type]
        raise SettingsError(f"`{argument}` is {value}, expected {expected}.")


def check_local(argument: str, value: object) -> None:
    """Refuse an address, such as `s3://bucket/folder`, as the path of what is to be written."""
    if re.match(r"\w[\w+.-]+:/", str(value)):  # a `Path` makes one slash of two
        raise SettingsError(f"`{argument}` is {str(value)!r}, but nothing is written to an address. Give a local path.")


def check_choice(argument: str, value: object, choices: object, *, optional: bool = False) -> None:
    """Refuse what is none of the words of the `Literal` that `choices` is."""
    words = get_args(choices)
    if value not in words and not (optional and value is None):
        raise SettingsError(f"`{argument}` is {shorten(value)}, expected one of {', '.join(words)}.")


def check_callable(argument: str, value: object, expected: str, *, optional: bool = False) -> None:
    """Refuse what cannot be called."""
    if not callable(value) and not (optional and value is None):
        raise SettingsTypeError(f"`{argument}` is {shorten(value)}, expected {expected}.")
