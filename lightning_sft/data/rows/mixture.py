"""Mixtures: sources of training rows with weights.

A source's weight says how many times an epoch goes through its rows: with `{"a.jsonl": 2, "b.jsonl": 0.5}` each epoch
takes every row of the first file twice and half the rows of the second.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from lightning_sft.checks import check_type
from lightning_sft.data.rows.shown import shown_path
from lightning_sft.data.rows.sources import Source, open_sources
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten


@dataclass(frozen=True)
class WeightedSource:
    """A source with its weight.

    Attributes:
        name: A file, a pattern or a data set's name, as the user has given it.
        weight: How many times an epoch goes through its rows.
        num_rows: The rows of the source that can be trained on.
    """

    name: str
    weight: float
    num_rows: int

    @property
    def num_rows_per_epoch(self) -> int:
        """How many rows an epoch takes of the source; a row that it takes twice counts twice."""
        return round(self.num_rows * self.weight)

    def __str__(self) -> str:
        return f"{shown_path(self.name)} (weight {self.weight:g}, {self.num_rows_per_epoch:,} rows in each epoch)"


def read_weights(data: Mapping[Any, Any], argument: str) -> dict[str, float]:
    """Check weights by the names of sources; return them, each name as a string and each weight as a float."""
    if not data:
        raise SettingsError(f"`{argument}` is {{}}; expected at least one source with its weight.")
    for name, weight in data.items():
        if isinstance(weight, Dataset | IterableDataset):
            raise SettingsTypeError(
                f"`{argument}` has the data sets {shorten(list(map(str, data)), 200)}, expected one. Choose one of "
                f'them, such as `{argument}["{name}"]`.'
            )
        check_type(argument, name, (str, Path), "a file or a data set's name before each weight")
        of_name = f"{argument}[{str(name)!r}]"
        check_type(of_name, weight, Real, "a weight: how many times an epoch goes through its rows")
        if not 0 < weight < math.inf:
            raise SettingsError(
                f"`{of_name}` is {weight}, expected a positive number: how many times an epoch goes "
                "through its rows. Leave the source out if it is not to be used."
            )
    return {str(name): float(weight) for name, weight in data.items()}


def open_weighted(weights: Mapping[str, float], argument: str) -> dict[str, list[Source]]:
    """Open the sources that each name stands for, which are several if it is a pattern of files."""
    groups = {name: open_sources(name, argument) for name in weights}
    seen: dict[str, str] = {}
    for name, sources in groups.items():
        for source in sources:
            key = os.path.realpath(source.name) if os.path.isfile(source.name) else source.rows._fingerprint
            if key in seen:
                both = " and ".join(dict.fromkeys(map(repr, (seen[key], name))))
                raise SettingsError(
                    f"`{argument}` has {source.name} twice, in {both}. Name it once, with the sum of its weights."
                )
            seen[key] = name
    return groups


def weighted_sources(weights: Mapping[str, float], sizes: Sequence[int], argument: str) -> list[WeightedSource]:
    """The sources with their weights and sizes, the numbers of rows that can be trained on."""
    sources = [WeightedSource(name, weight, size) for (name, weight), size in zip(weights.items(), sizes, strict=True)]
    for source in sources:
        if not source.num_rows:
            raise SettingsError(
                f"`{argument}` has no rows of {shorten(source.name, 200)} that can be trained on: all are too long, "
                "malformed, or for validation. Leave the source out."
            )
        if not source.num_rows_per_epoch:
            raise SettingsError(
                f"`{argument}[{source.name!r}]` is {source.weight:g}, which takes none of its {source.num_rows} rows "
                f"per epoch. Raise it above {0.5 / source.num_rows:.2g}, or leave the source out."
            )
    return sources
