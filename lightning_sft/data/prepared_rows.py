"""Rows of a split that are tokenised before they are used."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from lightning_sft.data.encoded_rows import EncodingReport, content_hash, read_numbers
from lightning_sft.data.rows.mixture import WeightedSource, weighted_sources
from lightning_sft.data.rows.sources import full_location
from lightning_sft.data.run_identity import check_same_data
from lightning_sft.data.steps.epoch_order import SourceShare
from lightning_sft.data.steps.plan import BatchPlan, StepRule, model_lengths
from lightning_sft.data.steps.step_loader import EpochByEpoch, LoaderOptions, PlanLoader, StepDataset, StepNumbers
from lightning_sft.data.tokens.example import check_length
from lightning_sft.errors import located
from lightning_sft.loops.progress import EpochPosition
from lightning_sft.loops.run_length import Epoch


@dataclass(frozen=True)
class SplitStatistics:
    """What a split holds.

    Attributes:
        num_tokens: Of each example, prompt and response, `(num_examples,)`.
        num_response_tokens: Of each example, the labels that count in the loss, `(num_examples,)`.
        report: What became of the rows of its data.
        steps_per_epoch: Optimizer steps; None if the split is not trained on, or nobody knows.
        sources: How many examples it has of each source; empty if an epoch takes every one once.
    """

    num_tokens: NDArray[np.integer[Any]]
    num_response_tokens: NDArray[np.integer[Any]]
    report: EncodingReport
    steps_per_epoch: int | None = None
    sources: Mapping[str, int] = field(default_factory=dict)


class PreparedRows:
    """Encoded rows, and the optimizer steps over them.

    Args:
        label: The name of the split.
        rows: With the columns of `EncodedRows.dataset`.
        rule: How they are put into optimizer steps.
        sources: Where the rows come from, in their order, with weights; empty if an epoch takes every row once.
        row_numbers: Which row of the data each example comes from, `(num_examples,)`. By default one from each.
        report: What became of the data's rows. By default all became examples.
        only_source: The name of the source if there is one alone: then no location needs to say it.
        sets: Names and sizes of sets that are also evaluated each by itself, in the order of the rows.
    """

    def __init__(
        self,
        label: str,
        rows: Dataset,
        rule: StepRule,
        *,
        sources: Sequence[WeightedSource] = (),
        row_numbers: NDArray[np.integer[Any]] | None = None,
        report: EncodingReport | None = None,
        only_source: str | None = None,
        sets: Mapping[str, int] | None = None,
    ) -> None:
        self.label, self.rows, self._rule, self._sources = label, rows, rule, sources
        self.only_source, self._sets = only_source, sets or {}
        self.row_numbers = np.arange(len(rows)) if row_numbers is None else row_numbers
        self._report = report or EncodingReport(len(np.unique(self.row_numbers)), len(rows))

    def selected(self, indices: NDArray[np.integer[Any]]) -> "PreparedRows":
        """Some of the rows; those of each source stay together, and the sources keep their weights."""
        sources = self._sources
        if sources:
            bounds = np.cumsum([source.num_rows for source in sources])
            of_source = np.searchsorted(bounds, indices, side="right")
            indices = indices[np.argsort(of_source, kind="stable")]
            sizes = np.bincount(of_source, minlength=len(bounds)).tolist()
            sources = weighted_sources({source.name: source.weight for source in sources}, sizes, "train_data")
        row_numbers = self.row_numbers[indices]
        return PreparedRows(
            self.label,
            self.rows.select(indices),
            self._rule,
            sources=sources,
            row_numbers=row_numbers,
            report=replace(self._report, num_rows=len(np.unique(row_numbers)), num_examples=len(indices)),
            only_source=self.only_source,
        )

    def unweighted(self, label: str | None = None) -> "PreparedRows":
        """The same rows, perhaps of another split, each once in an epoch, whatever the weights of their sources."""
        return PreparedRows(
            label or self.label, self.rows, self._rule, row_numbers=self.row_numbers, only_source=self.only_source
        )

    def plan(self, world_size: int, epoch: Epoch | None = None) -> BatchPlan:
        """The optimizer steps; `epoch` says what an epoch takes of the rows. None: all, shuffled."""
        num_tokens = read_numbers(self.rows, "num_tokens")
        with self._longest_named(num_tokens):
            return BatchPlan(
                model_lengths(num_tokens),
                read_numbers(self.rows, "num_response_tokens"),
                self._rule,
                world_size=world_size,
                shuffle=epoch is None or epoch.shuffle,
                limit_steps_per_epoch=None if epoch is None else epoch.num_steps,
                sources=[SourceShare(each.num_rows, each.num_rows_per_epoch) for each in self._sources] or None,
            )

    def count_steps(self) -> int:
        """Optimizer steps of an epoch; rows longer than `max_tokens_per_microbatch` are refused."""
        return self.plan(world_size=1).steps_per_epoch

    def position(self, num_steps: int) -> EpochPosition:
        """Where a run is after so many optimizer steps, if each of its epochs takes all rows."""
        return EpochPosition.in_equal_epochs(num_steps, self.count_steps())

    def loader(self, epoch: Epoch | None, steps: StepNumbers | None, options: LoaderOptions) -> PlanLoader:
        """Iterates over the optimizer steps with these numbers; None: an epoch's, each pass over all of it the next."""
        num_tokens = read_numbers(self.rows, "num_tokens")
        with self._longest_named(num_tokens):
            check_length(int(num_tokens.max()), options.num_positions)
        plan = self.plan(options.world_size, epoch)
        steps = EpochByEpoch(plan.steps_per_epoch) if steps is None else steps
        return PlanLoader(StepDataset(self.rows, plan, options), steps, options)

    def _longest_named(self, num_tokens: NDArray[np.integer[Any]]) -> AbstractContextManager[None]:
        """Begin errors with the location of the longest row: whatever is too long, this one is."""
        location = self.rows[int(np.argmax(num_tokens))]["location"]
        return located(full_location(location, self.only_source))

    def in_order(self, options: LoaderOptions) -> PlanLoader:
        """Iterates over all rows once, in the order of the data."""
        num_steps = self.count_steps()
        return self.loader(Epoch(num_steps, shuffle=False), range(num_steps), options)

    def by_sets(self, options: LoaderOptions) -> PlanLoader | list[PlanLoader]:
        """The same, with a loader for each set that has a name."""
        loaders, start = [], 0
        for name, size in self._sets.items():
            loaders.append(self.selected(np.arange(start, start + size)).in_order(options))
            loaders[-1].set_name = name
            start += size
        return loaders or self.in_order(options)

    def lengths(self) -> list[int]:
        """Tokens of the rows as the model sees them, the longest first."""
        lengths: list[int] = np.sort(model_lengths(read_numbers(self.rows, "num_tokens")))[::-1].tolist()
        return lengths

    def statistics(self) -> SplitStatistics:
        """What the rows are, in numbers."""
        return SplitStatistics(
            read_numbers(self.rows, "num_tokens"),
            read_numbers(self.rows, "num_response_tokens"),
            self._report,
            self.count_steps(),
            {str(source): source.num_rows for source in self._sources},
        )

    def facts(self, source: str | None) -> dict[str, Any]:
        """What a model card says of them: where they come from, and their numbers."""
        examples = {f"{self.label} examples": len(self.rows)} if self._report.counts_examples else {}
        return {
            self.label: source,
            f"{self.label} rows": self._report.num_rows,
            **examples,
            f"{self.label} tokens": int(read_numbers(self.rows, "num_tokens").sum()),
            f"{self.label} response tokens": int(read_numbers(self.rows, "num_response_tokens").sum()),
        }

    def state(self, num_steps: int) -> dict[str, Any]:
        """What a checkpoint keeps of the rows: what their order depends on, the same after any number of steps."""
        return self._identity

    def resume(self, state: Mapping[str, Any]) -> None:
        """Refuse to continue from a checkpoint with another `state`."""
        check_same_data(state, self._identity)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        identity = {"num_rows": len(self.rows), "rows": content_hash(self.rows)}
        identity |= {"batch_size": self._rule.batch_size, "seed": self._rule.seed}
        if self._sources:
            identity["weights"] = [[source.num_rows, source.num_rows_per_epoch] for source in self._sources]
        return identity
