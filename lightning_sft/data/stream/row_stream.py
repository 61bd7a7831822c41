"""Rows of one source that are read while they are used, from any position on."""

import glob
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from lightning_sft.data.rows.files import FileKind, check_parquet, find_files, is_remote, unreadable
from lightning_sft.data.rows.named_sets import load_named
from lightning_sft.data.rows.readers import read_file
from lightning_sft.data.rows.row_format import AnyRow
from lightning_sft.data.rows.sources import own_keys
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten


@dataclass(frozen=True)
class SourcePosition:
    """Where the next row of a source is read.

    Attributes:
        num_read: Rows before it. Those of a JSONL, JSON, CSV or TSV file are skipped.
        state: Of the data set, as `datasets` keeps it, which goes on where it was; None for a file that is read here.
    """

    num_read: int = 0
    state: dict[str, Any] | None = None


class RowStream:
    """The rows of one file or data set in their order, read when they are asked for.

    A file of text is read here, by its name; of all else `datasets` streams a data set.
    """

    def __init__(self, name: str, argument: str, dataset: IterableDataset | None = None) -> None:
        self.name, self._argument = name, argument
        self._dataset, self._current, self._num_read = dataset, dataset, 0

    def read(self, position: SourcePosition | None = None) -> Iterator[tuple[str, AnyRow]]:
        """The rows from a position on, each with its location, such as `line 3 of train.jsonl`."""
        position = position or SourcePosition()
        self._num_read = position.num_read
        try:
            if self._dataset is None:
                for location, row in read_file(self.name, skip=self._num_read):
                    self._num_read += 1
                    yield f"{location} of {self.name}", row
            else:
                self._current = deepcopy(self._dataset)  # a copy, because it keeps its position
                if position.state is not None:
                    self._current.load_state_dict(position.state)
                for row in self._current:
                    self._num_read += 1
                    yield f"row {self._num_read} of {self.name}", own_keys(row, self._dataset.features)
        except Exception as error:
            raise unreadable(self._argument, self.name, error) from error

    def position(self) -> SourcePosition:
        """Where `read` is to go on after the row that it has given last."""
        return SourcePosition(self._num_read, None if self._current is None else self._current.state_dict())


def open_streams(data: object, argument: str) -> list[RowStream]:
    """Find the rows behind a data argument, files or data sets by name as in `open_sources`, without reading them."""
    names = [data] if isinstance(data, str | Path) else data
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | Path) for name in names):
        raise SettingsTypeError(
            f"`{argument}` is {shorten(data)} of type {type(data).__name__}; with `streaming` expected a file, a data "
            "set's name, or a list of these."
        )
    streams = []
    for name in map(str, names):
        paths = find_files(name, argument)
        if not paths:
            streams.append(RowStream(name, argument, load_named(name, argument, streaming=True)))
        for path in paths:
            is_parquet = FileKind.of(path).suffix == ".parquet"
            streams.append(RowStream(path, argument, _open_parquet(path, argument) if is_parquet else None))
    if not streams:
        raise SettingsError(f"`{argument}` has no rows; expected at least one.")
    return streams


def _open_parquet(path: str, argument: str) -> IterableDataset:
    try:
        if not is_remote(path):  # or each file would be asked for twice
            check_parquet(path)
        files = [path if is_remote(path) else glob.escape(path)]
        return load_dataset("parquet", data_files=files, split="train", streaming=True)
    except Exception as error:
        raise unreadable(argument, path, error) from error


def only_name(streams: Sequence[RowStream]) -> str | None:
    """The name of the source if there is one alone: then no location needs to say it."""
    return streams[0].name if len(streams) == 1 else None
