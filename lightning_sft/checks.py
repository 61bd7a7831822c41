"""Arguments of the wrong type or out of range: refused by name, in the same words everywhere."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, get_args

from lightning_sft.errors import SettingsError, SettingsTypeError, shorten


def check_type(
    argument: str, value: object, kind: type | tuple[type, ...], expected: str, *, optional: bool = False
) -> None:
    """Refuse a value of another type.

    Args:
        argument: Its name.
        value: What came.
        kind: The type, or several.
        expected: What is expected, in words.
        optional: Whether None will do, too.

    Raises:
        SettingsTypeError: The message names the argument, what came and what was expected.
    """
    if optional and value is None:
        return
    number = kind in (Integral, Real)
    if not isinstance(value, kind) or (number and isinstance(value, bool)):  # True is no number here
        raise SettingsTypeError(
            f"`{argument}` is {shorten(value)} of type {type(value).__name__}, expected {expected}."
        )


def check_integer(argument: str, value: object, at_least: int | None = None, *, optional: bool = False) -> None:
    """Refuse what is no whole number, or too small a one.

    Args:
        argument: Its name.
        value: What came.
        at_least: The smallest that will do.
        optional: Whether None will do, too.

    Raises:
        SettingsTypeError: If it is no whole number.
        SettingsError: If it is too small.
    """
    if optional and value is None:
        return
    check_type(argument, value, Integral, "a whole number")
    if at_least is not None and value < at_least:  # type: ignore[operator]
        raise SettingsError(f"`{argument}` is {value}, expected at least {at_least}.")


def check_number(
    argument: str,
    value: object,
    expected: str,
    fits: Callable[[Any], bool] = math.isfinite,
    *,
    optional: bool = False,
) -> None:
    """Refuse what is no number, or one that does not fit.

    Args:
        argument: Its name.
        value: What came.
        expected: What is expected, in words.
        fits: Whether a number will do. It is never asked about NaN, which never does.
        optional: Whether None will do, too.

    Raises:
        SettingsTypeError: If it is no number.
        SettingsError: If it does not fit.
    """
    if optional and value is None:
        return
    check_type(argument, value, Real, expected)
    if math.isnan(value) or not fits(value):  # type: ignore[arg-type]
        raise SettingsError(f"`{argument}` is {value}, expected {expected}.")


def check_choice(argument: str, value: object, choices: object, *, optional: bool = False) -> None:
    """Refuse what is none of the words of a `Literal`.

    Args:
        argument: Its name.
        value: What came.
        choices: The `Literal`.
        optional: Whether None will do, too.

    Raises:
        SettingsError: If it is none of them.
    """
    words = get_args(choices)
    if value not in words and not (optional and value is None):
        raise SettingsError(f"`{argument}` is {shorten(value)}, expected one of {', '.join(words)}.")


def check_callable(argument: str, value: object, expected: str, *, optional: bool = False) -> None:
    """Refuse what cannot be called.

    Args:
        argument: Its name.
        value: What came.
        expected: What is expected, in words.
        optional: Whether None will do, too.

    Raises:
        SettingsTypeError: If it cannot.
    """
    if not callable(value) and not (optional and value is None):
        raise SettingsTypeError(f"`{argument}` is {shorten(value)}, expected {expected}.")
