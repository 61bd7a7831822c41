"""Streamed rows made into tokens: window after window of successive rows, by one process or a share by each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np
import torch.distributed as dist

from lightning_sft.data.encoding import RowEncoder
from lightning_sft.data.rows.bad_rows import BadRow
from lightning_sft.data.stream.row_stream import RowStream, only_name
from lightning_sft.data.stream.stream_order import StreamedRow, StreamPosition, ordered_rows
from lightning_sft.data.tokens.example import Example
from lightning_sft.errors import SettingsError, one_line

_ROWS_PER_EXCHANGE = 32  # that each process encodes at least, since an exchange costs as much as a few rows do


@dataclass(frozen=True)
class EncodedRow:
    """What became of a row.

    Attributes:
        after: Where the next row is taken.
        examples: None of a row that is left out, several of some conversations.
        bad_row: What is wrong with it, if it is left out for that.
        error: What is wrong with it, if that is an error.
    """

    after: StreamPosition
    examples: Sequence[Example] = ()
    bad_row: BadRow | None = None
    error: SettingsError | None = None


Window = Sequence[EncodedRow]
OpenWindows = Callable[[StreamPosition], Iterator[Window]]


@dataclass(frozen=True)
class RowWindows:
    """Encodes the rows of a stream, window after window; without a seed they are in the order of the data."""

    streams: Sequence[RowStream]
    encoder: RowEncoder
    batch_size: int
    rows_per_block: int
    seed: int | None

    def read(self, begin: StreamPosition, rank: int = 0, world_size: int = 1) -> Iterator[Window]:
        """Endlessly the rows from a position on, encoded; of several processes, each encodes its share of them.

        All processes read the same rows, window after window. Of each window a process encodes every `world_size`-th
        row, so that all have equally many and that their shares together are the window.
        """
        rows = ordered_rows(self.streams, self.rows_per_block, self.seed, begin)
        share = self.batch_size if world_size == 1 else max(-(-self.batch_size // world_size), _ROWS_PER_EXCHANGE)
        while True:
            yield self._encode(list(islice(rows, share * world_size))[rank::world_size])

    def _encode(self, rows: Sequence[StreamedRow]) -> Window:
        try:
            encoded = self.encoder.encode([(each.location, each.row) for each in rows], only_name(self.streams))
        except SettingsError as error:
            if len(rows) > 1:  # the rows before the bad one are used before it is an error
                return [encoded for row in rows for encoded in self._encode([row])]
            return [EncodedRow(rows[0].after, error=error)]
        examples: list[list[Example]] = [[] for _ in rows]
        bad_rows: dict[int, BadRow] = {}
        for each in encoded:
            if each.problem is not None:
                bad_rows[each.text.row] = BadRow(each.text.location, each.problem)
            elif not each.is_dropped:
                ids = np.asarray(each.example.input_ids, np.int32)  # small on the way to other processes
                examples[each.text.row].append(replace(each.example, input_ids=cast(Sequence[int], ids)))
        return [
            EncodedRow(row.after, of_row, bad_rows.get(number))
            for number, (row, of_row) in enumerate(zip(rows, examples, strict=True))
        ]


class Exchange:
    """Gives a value of each process to all of them, by main memory: no device is waited for.

    All processes make it at the same time, and call it equally often.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    def __call__(self, value: Any) -> list[Any]:
        """The values of all processes by rank."""
        values = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def whole_windows(shares: Iterator[Window], exchange: Callable[[Any], list[Any]]) -> Iterator[Window]:
    """Windows with the rows of all processes, put together from the share of each.

    If one process fails, all do; of several `SettingsError`s each raises that of the first process.
    """
    while True:
        try:
            share: Window | Exception = next(shares)
        except SettingsError as error:
            share = error
        except Exception as error:
            exchange(RuntimeError(f"Another process cannot encode rows: {type(error).__name__}: {one_line(error)}"))
            raise
        found = exchange(share)
        for each in found:
            if isinstance(each, Exception):
                raise each
        yield [row for rows in zip(*found, strict=True) for row in rows]
