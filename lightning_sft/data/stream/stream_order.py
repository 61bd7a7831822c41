"""The order of streamed rows: block after block of all sources, each block shuffled, from any position on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_sft.data.rows.row_format import AnyRow
from lightning_sft.data.stream.row_stream import RowStream, SourcePosition
from lightning_sft.errors import SettingsError


@dataclass(frozen=True)
class StreamPosition:
    """Where the next row is taken.

    Attributes:
        num_passes: How often the data has been gone through before.
        num_blocks: Blocks before this one in this pass.
        source: Which of the sources the block begins in, from 0.
        source_position: Where in that source; None at its beginning.
        num_taken: Rows of the block that have been taken, in its shuffled order.
        num_examples_taken: Examples of the next row that have been taken; others of it are still to come.
    """

    num_passes: int = 0
    num_blocks: int = 0
    source: int = 0
    source_position: SourcePosition | None = None
    num_taken: int = 0
    num_examples_taken: int = 0

    def next_pass(self) -> "StreamPosition":
        """The beginning of the data once more."""
        return StreamPosition(num_passes=self.num_passes + 1)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "StreamPosition":
        """The position whose `asdict` is given."""
        of_source = values["source_position"]
        return cls(**{**values, "source_position": None if of_source is None else SourcePosition(**of_source)})


@dataclass(frozen=True)
class StreamedRow:
    """A row, its location, such as `line 3 of train.jsonl`, and the position of the next row."""

    location: str
    row: AnyRow
    after: StreamPosition


def ordered_rows(
    streams: Sequence[RowStream], rows_per_block: int, seed: int | None, position: StreamPosition
) -> Iterator[StreamedRow]:
    """Endlessly all rows from a position on, shuffled within each block.

    The seed gives each block of each pass an order of its own; without one it is the order of the data.
    """
    for start, block in _read_blocks(streams, rows_per_block, position):
        order = np.arange(len(block))
        if seed is not None:
            np.random.default_rng([seed, start.num_passes, start.num_blocks, 1]).shuffle(order)
        for taken in range(start.num_taken, len(block)):
            location, row = block[order[taken]]
            yield StreamedRow(location, row, replace(start, num_taken=taken + 1, num_examples_taken=0))


def _read_blocks(
    streams: Sequence[RowStream], rows_per_block: int, position: StreamPosition
) -> Iterator[tuple[StreamPosition, list[tuple[str, AnyRow]]]]:
    """Endlessly all rows, source by source, each block with the position where it begins.

    Of the first block, too, all rows are read, whatever has been taken of them.
    """
    while True:
        block: list[tuple[str, AnyRow]] = []
        first, first_position = position.source, position.source_position
        is_empty = first_position is None
        for number in range(first, len(streams)):
            for located_row in streams[number].read(first_position if number == first else None):
                block.append(located_row)
                is_empty = False
                if len(block) == rows_per_block:
                    yield position, block
                    position = StreamPosition(
                        position.num_passes, position.num_blocks + 1, number, streams[number].position()
                    )
                    block = []
        if block:
            yield position, block
        if is_empty:
            raise SettingsError("`train_data` has no rows; expected at least one.")
        position = position.next_pass()
