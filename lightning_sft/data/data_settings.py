"""Where the rows of each split come from and how they are read, as the user has given it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

from datasets import DatasetDict

from lightning_sft.checks import check_integer, check_number, check_type
from lightning_sft.data.rows.mixture import read_weights
from lightning_sft.data.rows.sources import Data
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten


@dataclass(frozen=True)
class DataSettings:
    """Where the rows of each split come from and how they are read; `SFTDataModule` explains the settings."""

    train_data: Data | Mapping[str, Any] | None = None
    val_data: Mapping[str, Any] | Data | None = None
    test_data: Mapping[str, Any] | Data | None = None
    predict_data: Data | None = None
    val_fraction: float = 0.0
    streaming: bool = False
    shuffle_buffer: int = 10_000
    num_workers: int = 0
    num_proc: int | None = None

    def __post_init__(self) -> None:
        expected = "a fraction of the rows: at least 0, below 1"
        check_number("val_fraction", self.val_fraction, expected, lambda fraction: 0.0 <= fraction < 1.0)
        check_type("streaming", self.streaming, bool, "true or false")
        check_integer("shuffle_buffer", self.shuffle_buffer, at_least=1)
        if not self.streaming and self.shuffle_buffer != DataSettings.shuffle_buffer:
            raise SettingsError(
                f"`shuffle_buffer` is {self.shuffle_buffer}, but only rows that are streamed are shuffled in blocks. "
                "Leave it out, or set `streaming` to true."
            )
        check_integer("num_workers", self.num_workers, at_least=0)
        check_integer("num_proc", self.num_proc, at_least=1, optional=True)
        if self.streaming and self.num_workers > 1:
            raise SettingsError(
                f"`num_workers` is {self.num_workers}, expected 0 or 1 with `streaming`, which reads one row after "
                "another."
            )
        if self.val_fraction and self.val_data is not None:
            raise SettingsError(
                "Both `val_data` and `val_fraction` are given; the validation rows come from one of them. Leave one "
                "out."
            )
        for split in ("val", "test", "predict"):
            if isinstance(data := self.of(split), Mapping):
                _check_sets(split, data)
        weights = self.weights  # read here, so that wrong ones are refused at once
        if self.streaming and (self.val_fraction or weights):
            given = f"`val_fraction` is {self.val_fraction}" if self.val_fraction else "`train_data` has weights"
            raise SettingsError(
                f"{given}, but with `streaming` the number of training rows is not known. Give `val_data` and a list "
                "of sources, or leave out `streaming`."
            )

    def of(self, split: str) -> Any:
        """What is given for a split: `train`, `val`, `test` or `predict`."""
        return getattr(self, f"{split}_data")

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows."""
        return self.val_data is not None or self.val_fraction > 0

    @cached_property
    def weights(self) -> dict[str, float]:
        """The names of the sources of training rows with their weights; empty if these have none."""
        return read_weights(self.train_data, "train_data") if isinstance(self.train_data, Mapping) else {}


def _check_sets(split: str, data: Mapping[Any, Any]) -> None:
    """Refuse what is given by names, if these are not names of sets to evaluate."""
    argument = f"{split}_data"
    if isinstance(data, DatasetDict):
        read_weights(data, argument)  # refuses it in its own words
    if not data:
        raise SettingsError(f"`{argument}` is {{}}; expected at least one set, such as {{name: source}}.")
    if any(isinstance(value, Real) for value in data.values()):
        raise SettingsTypeError(
            f"`{argument}` is {shorten(data)}, but weights are for `train_data` alone. Give a list of the sources, "
            "which are evaluated together, or `{name: source}` to evaluate each by itself, too."
        )
    if split == "predict":
        raise SettingsTypeError(
            f"`{argument}` is {shorten(data)}, but only `val_data` and `test_data` may be several sets with names. "
            "Give a list of the sources."
        )
    for name in data:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise SettingsError(
                f"`{argument}` has a set named {name!r}, expected letters, digits and `_`, `-` or `.`, since its loss "
                f"is to be called `{split}/<name>/loss`."
            )
