"""Training rows that are read and tokenised while training: data sets too large to prepare.

Every process reads the same rows in the same order and tokenises all rows of a step, whose lengths decide which are its
own; so a step is the same on any number of processes, and its totals are exact.
"""

import glob
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.collation import collate
from lightning_sft.data.encoded_rows import hash_of_examples, rows_in_memory
from lightning_sft.data.encoding import EncodedRow, RowEncoder
from lightning_sft.data.example import Example
from lightning_sft.data.optimizer_step import OptimizerStep
from lightning_sft.data.plan import Layout, StepRule
from lightning_sft.data.readers import read_file
from lightning_sft.data.row_format import Row
from lightning_sft.data.sources import find_files, load_named, own_keys
from lightning_sft.data.step_loader import StepLoader, plan_steps
from lightning_sft.errors import SettingsError, SettingsTypeError, located, one_line, shorten

# Where the next row is read: the pass over the data, from 0; in it a block, from 0, which begins at a position of a
# source; and how many rows of the block, in its shuffled order, have been taken. Plain values, for checkpoints.
Place = dict[str, Any]
BEGINNING: Place = {"pass": 0, "block": 0, "source": 0, "position": None, "taken": 0}


# -- rows ----------------------------------------------------------------------------------------------------------


class RowStream:
    """The rows of one file or data set in their order, read when they are asked for.

    Args:
        name: What messages call it, and the path if it is a file.
        argument: What messages call the argument that it comes from.
        dataset: What `datasets` streams; None: the file is read here.
    """

    def __init__(self, name: str, argument: str, dataset: IterableDataset | None = None) -> None:
        self.name, self._argument = name, argument
        self._dataset, self._current, self._num_read = dataset, dataset, 0

    def read(self, position: list[Any] | None = None) -> Iterator[tuple[str, Row]]:
        """The rows from a position on, each with the words that locate it.

        Raises:
            ValueError: If the source cannot be read; the message names file and line.
        """
        self._num_read, state = position or (0, None)
        try:
            if self._dataset is None:
                for location, row in read_file(self.name, self._num_read):
                    self._num_read += 1
                    yield f"{location} of {self.name}", row
            else:
                self._current = deepcopy(self._dataset)  # a copy, because it keeps its position
                if state is not None:
                    self._current.load_state_dict(state)
                for row in self._current:
                    self._num_read += 1
                    yield f"row {self._num_read} of {self.name}", own_keys(row, self._dataset.features)
        except Exception as error:
            problem = one_line(error.__cause__ or error)
            raise SettingsError(f"`{self._argument}`: cannot read {self.name}: {problem}") from error

    def position(self) -> list[Any]:
        """Where `read` is to go on. A file is skipped up to there; `datasets` begins at the part that it was in."""
        return [self._num_read, None if self._current is None else self._current.state_dict()]


def open_streams(data: object, argument: str) -> list[RowStream]:
    """Find the rows behind a data argument without reading them.

    Args:
        data: A file, a glob pattern, a hub data set's name or a list of these, as in `open_sources`.
        argument: What messages call the argument.

    Raises:
        FileNotFoundError: If a file is missing or a pattern matches none.
        TypeError: If `data` is none of these.
        ValueError: If a data set cannot be loaded.
    """
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
            parquet = {"data_files": [glob.escape(path)], "split": "train", "streaming": True}
            dataset = load_dataset("parquet", **parquet) if path.endswith(".parquet") else None
            streams.append(RowStream(path, argument, dataset))
    if not streams:
        raise SettingsError(f"`{argument}` has no rows; expected at least one.")
    return streams


def read_blocks(streams: Sequence[RowStream], size: int, place: Place) -> Iterator[tuple[Place, list[tuple[str, Row]]]]:
    """Endlessly all rows, source by source, `size` at a time, each block with the place where it begins.

    Raises:
        ValueError: If a whole pass has no row, or a source cannot be read.
    """
    while True:
        block: list[tuple[str, Row]] = []
        first, position, is_empty = place["source"], place["position"], place["position"] is None
        for number in range(first, len(streams)):
            for item in streams[number].read(position if number == first else None):
                block.append(item)
                is_empty = False
                if len(block) == size:
                    yield place, block
                    at = {"source": number, "position": streams[number].position()}
                    place, block = BEGINNING | {"pass": place["pass"], "block": place["block"] + 1} | at, []
        if block:
            yield place, block
        if is_empty:
            raise SettingsError("`train_data` has no rows; expected at least one.")
        place = BEGINNING | {"pass": place["pass"] + 1}


def ordered_rows(
    streams: Sequence[RowStream], size: int, seed: int | None, place: Place
) -> Iterator[tuple[Place, str, Row]]:
    """Endlessly all rows, shuffled within each block, with the place of the row after and the words that locate it.

    Args:
        streams: The sources.
        size: Rows of a block, which are in memory together.
        seed: Of the order, which is another one in each block and pass. None: the order of the data.
        place: Where to begin.
    """
    for start, block in read_blocks(streams, size, place):
        order = np.arange(len(block))
        if seed is not None:
            np.random.default_rng([seed, start["pass"], start["block"], 1]).shuffle(order)
        for taken in range(start["taken"], len(block)):
            yield start | {"taken": taken + 1}, *block[order[taken]]


def first_rows(streams: Sequence[RowStream], number: int, encoder: RowEncoder) -> tuple[Dataset, int, int]:
    """The first rows of the data, tokenised; how many of them were dropped, and how many truncated."""
    rows = list(islice((item for stream in streams for item in stream.read()), number))
    encoded = _encode(streams, encoder, rows)
    return rows_in_memory(encoded), len(rows) - len(encoded), sum(row.is_truncated for row in encoded)


def _encode(streams: Sequence[RowStream], encoder: RowEncoder, rows: list[tuple[str, Row]]) -> list[EncodedRow]:
    return encoder.encode(rows, streams[0].name if len(streams) == 1 else None)


# -- optimizer steps -------------------------------------------------------------------------------------------------


class StreamedSteps(torch.utils.data.IterableDataset):
    """What one rank needs for each optimizer step, as `StepDataset` gives it, and the place that a checkpoint keeps.

    Args:
        streams: The sources.
        encoder: Tokenises rows, and drops some.
        rule: How rows are put into steps.
        world_size: Number of processes.
        rank: Of this process.
        pad_id: Fills padded positions.
        layout: Of the microbatches.
        shuffle_buffer: Rows that are shuffled together.
        shuffle: Whether they are.
        steps_per_pass: After so many steps the data begins anew; None: at its end.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        encoder: RowEncoder,
        rule: StepRule,
        world_size: int,
        rank: int,
        pad_id: int,
        layout: Layout,
        *,
        shuffle_buffer: int,
        shuffle: bool = True,
        steps_per_pass: int | None = None,
    ) -> None:
        self._streams, self._encoder, self._rule, self._world_size = streams, encoder, rule, world_size
        self._rank, self._pad_id, self._layout = rank, pad_id, layout
        self._order = (shuffle_buffer, rule.seed if shuffle else None)
        self._steps_per_pass = steps_per_pass
        self.begin_at(0, None)

    def begin_at(self, step: int, last: dict[str, Any] | None) -> None:
        """Set where the next iteration begins.

        Args:
            step: Its first step, over the whole run, from 0.
            last: The `place` of the step before.

        Raises:
            ValueError: If the step is not the first and nothing is known of the one before.
        """
        if step and last is None:
            raise SettingsError(
                f"The run is at step {step}, but its checkpoint does not say where that is in the stream of "
                "`train_data`. Start anew from the weights."
            )
        self._step, self._last = step, last

    def __iter__(self) -> Iterator[tuple[OptimizerStep, dict[str, Any]] | SettingsError]:
        try:
            yield from self._batches()
        except SettingsError as error:  # raised by the loader, not wrapped by a worker process: it is our own message
            yield error

    def _batches(self) -> Iterator[tuple[OptimizerStep, dict[str, Any]]]:
        step, place = self._step, BEGINNING
        if self._last is not None:  # that step is made once more: it tells whether these are still the same rows
            step, place = step - 1, self._last["place"]
        rows = ordered_rows(self._streams, *self._order, place)
        while True:
            examples, place_after = self._take(rows, place)
            last = {"step": step + 1, "place": place, "rows": hash_of_examples(examples)}
            if step >= self._step:
                yield self._batch(examples), last
            elif last != self._last:
                raise SettingsError(
                    "The checkpoint was made with other training rows or tokens: the run cannot continue at the same "
                    "place in the data. Use those, or start anew from the weights."
                )
            step, place = step + 1, place_after
            if self._steps_per_pass is not None and step % self._steps_per_pass == 0:
                place = BEGINNING | {"pass": place["pass"] + 1}
                rows = ordered_rows(self._streams, *self._order, place)

    def _batch(self, examples: Sequence[Example]) -> OptimizerStep:
        """This rank's part of a step, of which these are all rows."""
        num_tokens = [len(example.input_ids) for example in examples]
        num_response_tokens = [example.num_response_labels for example in examples]
        with located(examples[int(np.argmax(num_tokens))].location):  # whatever is too long, this one is
            epoch = plan_steps(num_tokens, num_response_tokens, self._rule, world_size=self._world_size, shuffle=False)
            plan = epoch.step(0, self._layout)
        microbatches = [
            collate([examples[i] for i in rows], self._layout, self._pad_id) for rows in plan.ranks[self._rank]
        ]
        return OptimizerStep(microbatches, plan.totals)

    def _take(self, rows: Iterator[tuple[Place, str, Row]], place: Place) -> tuple[list[Example], Place]:
        """The rows of a step, tokenised, and the place after the last. Each dropped row is made up for by the next."""
        examples: list[Example] = []
        last_kept = place["pass"]
        while missing := self._rule.batch_size - len(examples):
            taken = list(islice(rows, missing))
            place = taken[-1][0]
            encoded = _encode(self._streams, self._encoder, [(location, row) for _, location, row in taken])
            examples += [row.example for row in encoded]
            if encoded:
                last_kept = place["pass"]
            elif place["pass"] > last_kept + 1:
                raise SettingsError(
                    f"`train_data`: all rows are longer than `max_length` = {self._encoder.encoding.max_length} "
                    "tokens. Raise `max_length`."
                )
        return examples, place


class StreamLoader(StepLoader):
    """Iterates over streamed optimizer steps, and knows their places.

    Args:
        dataset: The steps.
        num_steps: Of the run.
        num_workers: 0 or 1: processes that read and tokenise ahead.
        first_step: Called when iteration begins: the steps already taken.
        places: By the number of steps taken, the place of the last of them; the latest two are kept here.
        tokenizer: For batches to show themselves.
        pin_memory: As for `StepLoader`.
    """

    def __init__(
        self,
        dataset: StreamedSteps,
        num_steps: int,
        num_workers: int,
        first_step: Callable[[], int],
        places: dict[int, dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(dataset, num_steps, num_workers, first_step, tokenizer, pin_memory)
        self._places = places

    def __iter__(self) -> Iterator[OptimizerStep]:
        first = self._first_step()
        self._dataset.begin_at(first, self._places.get(first))
        loader = DataLoader(self._dataset, batch_size=None, num_workers=self._num_workers, pin_memory=self._pin_memory)
        for number, item in zip(range(first, self._num_steps), loader, strict=False):
            if isinstance(item, SettingsError):
                raise item
            step, self._places[number + 1] = item
            self._places.pop(number - 1, None)
            yield replace(step, tokenizer=self._tokenizer)
