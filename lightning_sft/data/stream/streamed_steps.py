"""Optimizer steps of rows that are read and tokenised while training: data sets too large to prepare.

Every process reads the same rows in the same order and tokenises all rows of a step, whose lengths decide which are its
own; so a step is the same on any number of processes, and its totals are exact.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from lightning_sft.data.encoded_rows import hash_of_examples
from lightning_sft.data.encoding import RowEncoder
from lightning_sft.data.row_report import nothing_left
from lightning_sft.data.rows.bad_rows import BadRow, BadRowCounts
from lightning_sft.data.rows.sources import full_location
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.plan import BatchPlan, StepRule, model_lengths
from lightning_sft.data.steps.step_loader import LoaderOptions, StepLoader, StepNumbers
from lightning_sft.data.stream.bad_row_log import BadRowLog
from lightning_sft.data.stream.row_stream import RowStream, only_name
from lightning_sft.data.stream.stream_order import StreamedRow, StreamPosition, ordered_rows
from lightning_sft.data.tokens.collation import collate
from lightning_sft.data.tokens.example import Example, check_length
from lightning_sft.errors import SettingsError, located


@dataclass(frozen=True)
class Bookmark:
    """What a checkpoint keeps of a step, so that a run finds the next one.

    Attributes:
        num_steps: Optimizer steps of the run up to this one.
        begin: Where its rows begin.
        content: A hash of its rows' tokens.
        num_passes: How often the data had been gone through before its last row.
        epoch: That of its last row, from 0. Small data may come to its end several times in a step: that is one epoch.
        num_steps_in_epoch: Optimizer steps of this epoch up to this one.
    """

    num_steps: int
    begin: StreamPosition
    content: str
    num_passes: int = 0
    epoch: int = 0
    num_steps_in_epoch: int = 1

    def to_values(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Bookmark":
        """The bookmark that `to_values` has written."""
        return cls(**{**values, "begin": StreamPosition.from_values(values["begin"])})

    def of_next(self, begin: StreamPosition, content: str, num_passes: int) -> "Bookmark":
        """That of the step after this one."""
        epoch, before = self.epoch, self.num_steps_in_epoch
        if num_passes > self.num_passes:
            epoch, before = epoch + 1, 0
        return Bookmark(self.num_steps + 1, begin, content, num_passes, epoch, before + 1)


@dataclass(frozen=True)
class StreamOrder:
    """In which order rows are taken.

    Attributes:
        rows_per_block: Rows that are in memory, and shuffled, together.
        seed: Of the order; None: that of the data.
        steps_per_pass: After so many optimizer steps the data begins again. None: only where it ends.
    """

    rows_per_block: int
    seed: int | None
    steps_per_pass: int | None = None


@dataclass
class StreamedStep:
    """An optimizer step, its bookmark, and the bad rows that were left out on the way to it."""

    step: OptimizerStep
    bookmark: Bookmark
    bad_rows: Sequence[BadRow] = ()

    def pin_memory(self) -> "StreamedStep":
        """The same in memory that CUDA copies from by itself."""
        return replace(self, step=self.step.pin_memory())


@dataclass(frozen=True)
class PlacedExample:
    """An example, and where the next one is taken."""

    example: Example
    after: StreamPosition


class StreamedSteps(IterableDataset[StreamedStep | SettingsError]):
    """The optimizer steps of streamed rows, for one device, from `begin_after` on.

    Args:
        streams: The sources.
        encoder: Tokenises rows, and drops some.
        rule: How rows are put into steps.
        order: Of the rows.
        options: How steps are made.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        encoder: RowEncoder,
        rule: StepRule,
        order: StreamOrder,
        options: LoaderOptions,
    ) -> None:
        self._streams, self._encoder, self._rule, self._order = streams, encoder, rule, order
        self._options, self._pad_id = options, options.pad_id
        self._last: Bookmark | None = None
        self._bad_rows: list[BadRow] = []

    def begin_after(self, last: Bookmark | None) -> None:
        """Set after which step the next iteration begins; None: at the first."""
        self._last = last

    def __iter__(self) -> Iterator[StreamedStep | SettingsError]:
        try:
            yield from self._steps()
        except SettingsError as error:  # raised by the loader, not wrapped by a worker process: it is our own message
            yield error

    def _steps(self) -> Iterator[StreamedStep]:
        latest, begin = None, StreamPosition() if self._last is None else self._last.begin
        rows, waiting = self._rows(begin), deque[PlacedExample]()
        while True:
            examples, after = self._take(rows, begin, waiting)
            content, num_passes = hash_of_examples(examples), after.num_passes
            bad_rows, self._bad_rows = self._bad_rows, []
            if latest is None and self._last is not None:  # made once more, to tell whether the rows are still the same
                if content != self._last.content:
                    raise SettingsError(
                        "The checkpoint was made with other training rows or tokens: the run cannot continue at the "
                        "same place in the data. Use those, or begin a new run with its weights (`--init_from`)."
                    )
                latest = self._last
            else:
                first = Bookmark(1, begin, content, num_passes)
                latest = first if latest is None else latest.of_next(begin, content, num_passes)
                yield StreamedStep(self._step(examples), latest, bad_rows)
            begin = after
            if self._order.steps_per_pass is not None and latest.num_steps % self._order.steps_per_pass == 0:
                begin = begin.next_pass()
                rows, waiting = self._rows(begin), deque[PlacedExample]()

    def _rows(self, begin: StreamPosition) -> Iterator[StreamedRow]:
        return ordered_rows(self._streams, self._order.rows_per_block, self._order.seed, begin)

    def _step(self, examples: Sequence[Example]) -> OptimizerStep:
        """This device's part of a step, of which these are all rows."""
        num_tokens = [len(example.input_ids) for example in examples]
        num_response_tokens = [example.num_response_labels for example in examples]
        layout = self._options.layout
        longest = examples[int(np.argmax(num_tokens))].location  # whatever is too long, this one is
        with located(full_location(longest, only_name(self._streams))):
            check_length(max(num_tokens), self._options.num_positions)
            plan = BatchPlan(
                model_lengths(num_tokens),
                num_response_tokens,
                self._rule,
                world_size=self._options.world_size,
                shuffle=False,
            ).step(0, layout)
        microbatches = [
            collate([examples[index] for index in indices], layout, self._pad_id)
            for indices in plan.ranks[self._options.rank]
        ]
        return OptimizerStep(microbatches, plan.totals)

    def _take(
        self, rows: Iterator[StreamedRow], begin: StreamPosition, waiting: deque[PlacedExample]
    ) -> tuple[list[Example], StreamPosition]:
        """The examples of a step, and the position after the last.

        For each row that is dropped the next is taken. Of a row that becomes several examples, some can wait for the
        next step.
        """
        taken: list[PlacedExample] = []
        after = begin
        while missing := self._rule.batch_size - len(taken):
            if not waiting:
                block = list(islice(rows, missing))
                waiting.extend(self._encode(block, after))
                if not waiting and block[-1].after.num_passes > after.num_passes + 1:
                    limit = self._encoder.encoding.limit_in_words
                    raise nothing_left("`train_data`", BadRowCounts(self._bad_rows), limit)
            taken += [waiting.popleft() for _ in range(min(missing, len(waiting)))]
            after = taken[-1].after if taken else begin
        return [each.example for each in taken], after

    def _encode(self, rows: Sequence[StreamedRow], begin: StreamPosition) -> list[PlacedExample]:
        """The examples of rows, but for those that were taken before; `begin` says how many."""
        encoded = self._encoder.encode([(each.location, each.row) for each in rows], only_name(self._streams))
        self._bad_rows += [BadRow(each.text.location, each.problem) for each in encoded if each.problem is not None]
        placed: list[PlacedExample] = []
        before = replace(begin, num_examples_taken=0)
        for number, row in enumerate(rows):
            examples = [each.example for each in encoded if each.text.row == number and not each.is_dropped]
            for num_taken, example in enumerate(examples, 1):
                is_last = num_taken == len(examples)
                after = row.after if is_last else replace(before, num_examples_taken=num_taken)
                placed.append(PlacedExample(example, after))
            before = placed[-1].after if placed else before
        return placed[begin.num_examples_taken :]


class StreamLoader(StepLoader):
    """Iterates over streamed optimizer steps, and keeps their bookmarks.

    Args:
        dataset: The steps.
        steps: Their numbers.
        options: How they are made; at most one process reads and tokenises ahead.
        bookmarks: By the number of optimizer steps; here each step puts its own, and only the latest three stay: while
            one is taken, Lightning has asked for the next, and the run may be saved as it was before.
        bad_rows: Says which rows are left out.
    """

    def __init__(
        self,
        dataset: StreamedSteps,
        steps: StepNumbers,
        options: LoaderOptions,
        bookmarks: dict[int, Bookmark],
        bad_rows: BadRowLog,
    ) -> None:
        super().__init__(steps, options)
        self._dataset, self._bookmarks, self._bad_rows = dataset, bookmarks, bad_rows

    def __iter__(self) -> Iterator[OptimizerStep]:
        first = next(iter(self._steps), 0)
        if first and first not in self._bookmarks:
            raise SettingsError(
                f"The run is at step {first}, but its checkpoint does not say where that is in the stream of "
                "`train_data`. Start anew from the weights."
            )
        self._dataset.begin_after(self._bookmarks.get(first))
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self._options.num_workers,
            pin_memory=self._options.pin_memory,
        )
        for _, item in zip(self._steps, loader, strict=False):
            if isinstance(item, SettingsError):
                raise item
            num_steps = item.bookmark.num_steps
            self._bookmarks[num_steps] = item.bookmark
            self._bookmarks.pop(num_steps - 3, None)
            self._bad_rows.add(item.bad_rows)
            yield replace(item.step, tokenizer=self._options.tokenizer)
