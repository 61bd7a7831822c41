"""Names and settings for model cards, tables and loggers, without the folders of this machine."""

import os
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any


def shown_path(path: str) -> str:
    """A name or path as others may see it: of an absolute path the last part alone, of an address no secrets."""
    if "://" in path:
        address = path.partition("?")[0] if path.startswith("http") else path  # where signatures stand
        return re.sub("://[^/]*@", "://", address)  # and passwords
    return os.path.basename(os.path.normpath(path)) if os.path.isabs(path) else path


def shown_data(data: object) -> str | None:
    """The names of files and data sets, with their weights or those of sets; None for rows in memory, without one."""
    if isinstance(data, Mapping):
        return ", ".join(
            f"{shown_path(str(name))} (weight {value:g})"
            if isinstance(value, Real)
            else f"{name} ({shown_data(value) or 'in memory'})"
            for name, value in data.items()
        )
    names = [data] if isinstance(data, str | os.PathLike) else data
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | os.PathLike) for name in names):
        return None
    return ", ".join(shown_path(str(name)) for name in names)


def shown_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as a logger can keep them: plain values as they are, of all others the name.

    Args:
        arguments: By name, such as the `locals()` that `__init__` begins with; `self` is left out.
    """
    return {name: _shown(value) for name, value in arguments.items() if name not in ("self", "__class__")}


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | os.PathLike):
        return shown_path(str(value))
    if isinstance(value, Mapping):
        return {str(name): _shown(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        rows = any(isinstance(each, Mapping) for each in value)
        return f"{len(value)} rows" if rows else ", ".join(str(_shown(each)) for each in value)
    if name := getattr(value, "name_or_path", None):
        return shown_path(str(name))
    return getattr(value, "__qualname__", type(value).__qualname__)
