"""Several sources of training rows, and how many times an epoch goes through each."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from lightning_sft.checks import check_type
from lightning_sft.data.shown import shown_path
from lightning_sft.data.sources import Source, open_sources
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten


@dataclass(frozen=True)
class Share:
    """A source's rows, and how many times an epoch goes through them."""

    name: str
    weight: float
    num_rows: int

    @property
    def num_taken(self) -> int:
        """Rows of the source in each epoch."""
        return round(self.num_rows * self.weight)

    def __str__(self) -> str:
        return f"{shown_path(self.name)}, weight {self.weight:g}: {self.num_taken:,} an epoch of"


def read_weights(data: Mapping[Any, Any], argument: str) -> dict[str, float]:
    """The names of sources and their weights.

    Raises:
        TypeError: If a name is no text or path, or a weight no number, such as the data set of a `DatasetDict`.
        ValueError: If there is no source, or a weight is not positive or not finite.
    """
    if not data:
        raise SettingsError(f"`{argument}` is {{}}; expected at least one source with its weight.")
    for name, weight in data.items():
        if isinstance(weight, Dataset | IterableDataset):
            raise SettingsTypeError(
                f"`{argument}` has the data sets {shorten(list(map(str, data)), 200)}, expected one. Choose one of "
                f'them, such as `{argument}["{name}"]`.'
            )
        check_type(f"{argument}", name, (str, Path), "a file or a data set's name before each weight")
        check_type(
            f"{argument}[{str(name)!r}]", weight, Real, "a weight: how many times an epoch goes through its rows"
        )
        if not 0 < weight < math.inf:
            raise SettingsError(
                f"`{argument}[{str(name)!r}]` is {weight}, expected a positive number: how many times an epoch goes "
                "through its rows. Leave the source out if it is not to be used."
            )
    return {str(name): float(weight) for name, weight in data.items()}


def open_weighted(weights: Mapping[str, float], argument: str) -> tuple[list[Source], list[int]]:
    """Everything behind the names, and for each name how many sources these are: a pattern can mean many files.

    Raises:
        FileNotFoundError: As `open_sources`.
        ValueError: As `open_sources`; or if two names mean the same rows.
    """
    groups = [open_sources(name, argument) for name in weights]
    seen: dict[str, str] = {}
    for name, sources in zip(weights, groups, strict=True):
        for source in sources:
            key = os.path.realpath(source.name) if os.path.isfile(source.name) else source.rows._fingerprint
            if key in seen:
                both = " and ".join(dict.fromkeys(map(repr, (seen[key], name))))
                raise SettingsError(
                    f"`{argument}` has {source.name} twice, in {both}. Name it once, with the sum of its weights."
                )
            seen[key] = name
    return [source for sources in groups for source in sources], list(map(len, groups))


def shares(weights: Mapping[str, float], sizes: Sequence[int], argument: str) -> list[Share]:
    """Each source's part of an epoch.

    Raises:
        ValueError: If it has none.
    """
    found = [Share(name, weight, size) for (name, weight), size in zip(weights.items(), sizes, strict=True)]
    for share in found:
        if not share.num_rows:
            raise SettingsError(
                f"`{argument}` has no rows of {shorten(share.name, 200)} that can be trained on: all are too long, or "
                "for validation. Leave the source out."
            )
        if not share.num_taken:
            raise SettingsError(
                f"`{argument}[{share.name!r}]` is {share.weight:g}, which is none of its {share.num_rows} rows in an "
                f"epoch. Raise it above {0.5 / share.num_rows:.2g}, or leave the source out."
            )
    return found
