"""Names of files and data sets for model cards and tables, without the folders of this machine."""

import os
from collections.abc import Mapping


def shown_path(path: str) -> str:
    """A name or path as others may see it: of an absolute path the last part alone."""
    return os.path.basename(os.path.normpath(path)) if os.path.isabs(path) else path


def shown_data(data: object) -> str | None:
    """The names of files and data sets, with their weights; None for rows in memory, which have no name."""
    if isinstance(data, Mapping):
        return ", ".join(f"{shown_path(str(name))} (weight {weight:g})" for name, weight in data.items())
    names = [data] if isinstance(data, str) else data
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return None
    return ", ".join(map(shown_path, names))
