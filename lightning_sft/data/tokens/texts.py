"""Texts that come from users: proved to be text, shown in messages, read from template files."""

import os
from pathlib import Path

from lightning_sft.errors import MissingFileError, SettingsError


def check_is_text(subject: str, text: str) -> None:
    """Refuse a string with a lone surrogate: half of a character, which has no bytes in any file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingsError(
            f"{subject} holds a lone surrogate, which is not text: {around(text, error.start)!a}."
        ) from None


def around(text: str, position: int) -> str:
    """The 20 characters before a position and the 20 after it."""
    return text[max(position - 20, 0) : position + 20]


def common_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # by halves: comparing long slices is much faster than comparing characters one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low


def read_template_file(argument: str, path: str, placeholder: str, way_out: str) -> str:
    """The content of a file that holds a template. Every such template contains the placeholder, which no path does."""
    file = os.path.expanduser(path)
    if not os.path.isfile(file):  # `Path.is_file` raises on a text too long for a file name
        raise MissingFileError(
            f"`{argument}` is {path!r}, which has no {placeholder} in it and is no file either. {way_out}"
        )
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SettingsError(f"`{argument}` is {path!r}, which cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason}). Save the file as UTF-8."
        raise SettingsError(f"`{argument}` is {path!r}, which is {problem}") from None
