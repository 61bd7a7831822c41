"""Optimizer steps of rows that are read and tokenised while training: data sets too large to prepare.

Every process has the same rows with their tokens, and with them the lengths that decide which rows of a step are its
own; so a step is the same on any number of processes, and its totals are exact.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from lightning_sft.data.encoding import Encoding
from lightning_sft.data.row_report import nothing_left
from lightning_sft.data.rows.bad_rows import BadRow, BadRowCounts
from lightning_sft.data.rows.sources import full_location
from lightning_sft.data.run_identity import check_same_data
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.plan import BatchPlan, StepRule, model_lengths
from lightning_sft.data.steps.step_loader import LoaderOptions
from lightning_sft.data.stream.row_windows import OpenWindows
from lightning_sft.data.stream.stream_order import StreamPosition
from lightning_sft.data.tokens.collation import collate
from lightning_sft.data.tokens.example import Example, check_length
from lightning_sft.errors import located


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

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Bookmark":
        """The bookmark whose `asdict` is given, as a checkpoint has it."""
        return cls(**{**values, "begin": StreamPosition.from_values(values["begin"])})

    def of_next(self, begin: StreamPosition, content: str, num_passes: int) -> "Bookmark":
        """That of the step after this one."""
        epoch, before = self.epoch, self.num_steps_in_epoch
        if num_passes > self.num_passes:
            epoch, before = epoch + 1, 0
        return Bookmark(self.num_steps + 1, begin, content, num_passes, epoch, before + 1)


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
    """An example, where the next one is taken, and the rows that were left out since the one before."""

    example: Example
    after: StreamPosition
    bad_rows: Sequence[BadRow] = ()


class StreamedSteps:
    """The optimizer steps of streamed rows, for one device.

    The data begins again after `steps_per_pass` optimizer steps, or else only where it ends.
    """

    def __init__(
        self,
        rule: StepRule,
        encoding: Encoding,
        options: LoaderOptions,
        steps_per_pass: int | None = None,
        only_source: str | None = None,
    ) -> None:
        self._rule, self._encoding, self._options = rule, encoding, options
        self._steps_per_pass, self._only_source = steps_per_pass, only_source

    def after(self, last: Bookmark | None, open_windows: OpenWindows) -> Iterator[StreamedStep]:
        """Endlessly the steps after the one of a bookmark; None: from the first on."""
        latest, begin = None, StreamPosition() if last is None else last.begin
        placed = self._placed(begin, open_windows)
        while True:
            taken = list(islice(placed, self._rule.batch_size))
            examples, after = [each.example for each in taken], taken[-1].after
            content, num_passes = hash_of_examples(examples), after.num_passes
            bad_rows = [bad_row for each in taken for bad_row in each.bad_rows]
            if latest is None and last is not None:  # made once more, to tell whether the rows are still the same
                check_same_data({"rows": last.content}, {"rows": content})
                latest = last
            else:
                first = Bookmark(1, begin, content, num_passes)
                latest = first if latest is None else latest.of_next(begin, content, num_passes)
                yield StreamedStep(self._step(examples), latest, bad_rows)
            begin = after
            if self._steps_per_pass is not None and latest.num_steps % self._steps_per_pass == 0:
                begin = begin.next_pass()
                placed = self._placed(begin, open_windows)

    def _placed(self, begin: StreamPosition, open_windows: OpenWindows) -> Iterator[PlacedExample]:
        """Endlessly the examples of rows from a position on, but for those that were taken before."""
        num_before, before = begin.num_examples_taken, replace(begin, num_examples_taken=0)
        bad_rows: list[BadRow] = []
        for row in (row for window in open_windows(begin) for row in window):
            if row.error is not None:
                raise row.error
            if row.bad_row is not None:
                bad_rows.append(row.bad_row)
            for number, example in enumerate(row.examples, 1):  # some can wait for the next step
                is_last = number == len(row.examples)
                after = row.after if is_last else replace(before, num_examples_taken=number)
                if number > num_before:
                    yield PlacedExample(example, after, bad_rows)
                    bad_rows = []
            if row.examples:
                num_before, before = 0, row.after
            elif row.after.num_passes > before.num_passes + 1:
                raise nothing_left("`train_data`", BadRowCounts(bad_rows), self._encoding.limit_in_words)

    def _step(self, examples: Sequence[Example]) -> OptimizerStep:
        """This device's part of a step, of which these are all rows."""
        num_tokens = [len(example.input_ids) for example in examples]
        num_response_tokens = [example.num_response_labels for example in examples]
        layout = self._options.layout
        longest = examples[int(np.argmax(num_tokens))].location  # whatever is too long, this one is
        with located(full_location(longest, self._only_source)):
            check_length(max(num_tokens), self._options.num_positions)
            plan = BatchPlan(
                model_lengths(num_tokens),
                num_response_tokens,
                self._rule,
                world_size=self._options.world_size,
                shuffle=False,
            ).step(0, layout)
        microbatches = [
            collate([examples[index] for index in indices], layout, self._options.pad_id)
            for indices in plan.ranks[self._options.rank]
        ]
        return OptimizerStep(microbatches, plan.totals)


def hash_of_examples(examples: Sequence[Example]) -> str:
    """A hash of the token ids of examples, in their order, and of which of them are learnt."""
    hasher, bounds = hashlib.blake2b(digest_size=8), []
    for example in examples:
        hasher.update(np.asarray(example.input_ids, np.int32).data)
        bounds += [len(example.input_ids), example.num_prompt_tokens, len(example.excluded_spans)]
        bounds += example.excluded_spans
    hasher.update(np.asarray(bounds, np.int32).data)
    return hasher.hexdigest()
