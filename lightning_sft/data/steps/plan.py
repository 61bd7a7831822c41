"""The plan of optimizer steps: which examples form a step, on which rank, in which microbatch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_sft.checks import check_integer
from lightning_sft.data.steps.epoch_order import SourceShare, epoch_order
from lightning_sft.data.steps.microbatch_cuts import cut_by_cost, cut_by_count, deal_to_ranks, microbatch_cost
from lightning_sft.data.tokens.microbatch import Layout
from lightning_sft.errors import SettingsError


@dataclass(frozen=True)
class StepRule:
    """How sequences are put into optimizer steps, and steps into microbatches; `SFTDataModule` explains the settings.

    The last step of an epoch may have fewer sequences, and a step with few of them fewer microbatches.
    """

    batch_size: int = 32
    gradient_accumulation_steps: int | None = None
    max_tokens_per_microbatch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, at_least=1)
        check_integer("gradient_accumulation_steps", self.gradient_accumulation_steps, at_least=1, optional=True)
        check_integer("max_tokens_per_microbatch", self.max_tokens_per_microbatch, at_least=1, optional=True)
        check_integer("seed", self.seed, at_least=0)
        if self.gradient_accumulation_steps is not None and self.max_tokens_per_microbatch is not None:
            raise SettingsError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps} and `max_tokens_per_microbatch` "
                f"is {self.max_tokens_per_microbatch}, but both determine the microbatches. Give one of them."
            )


@dataclass  # not frozen, like all that a batch is made of: under `bf16-true` Lightning copies it field by field
class StepTotals:
    """Totals over sequences: those of an optimizer step over all ranks, or those of many steps.

    Attributes:
        num_sequences: Number of sequences.
        num_tokens: Number of model inputs, prompts and responses, without padding.
        num_response_tokens: Number of labels that count in the loss.
        num_attended: Pairs of a token and one that it attends to, itself included, in causal attention over each
            sequence.
    """

    num_sequences: int = 0
    num_tokens: int = 0
    num_response_tokens: int = 0
    num_attended: int = 0

    def __add__(self, other: "StepTotals") -> "StepTotals":
        return StepTotals(**{name: number + getattr(other, name) for name, number in vars(self).items()})

    def times(self, factor: float) -> "StepTotals":
        """These totals times a factor, rounded."""
        return StepTotals(**{name: round(factor * number) for name, number in vars(self).items()})


@dataclass(frozen=True)
class MicrobatchShape:
    """What the memory that a microbatch takes depends on.

    Attributes:
        lengths: Tokens of its sequences, longest first.
        num_response_tokens: Of each sequence.
        num_microbatches: Of its step on each rank.
    """

    lengths: list[int]
    num_response_tokens: list[int]
    num_microbatches: int


def largest_allowed_microbatch(rule: StepRule, max_length: int | None, world_size: int) -> MicrobatchShape:
    """The most that the settings allow in a microbatch, whatever the data: every row as long as it may be."""
    budget = rule.max_tokens_per_microbatch
    if budget is None and max_length is None:
        raise SettingsError(
            "Without rows a microbatch has no size limit. Set `max_tokens_per_microbatch` or `max_length`."
        )
    limits = [limit for limit in (budget, None if max_length is None else max_length - 1) if limit is not None]
    length, num_microbatches = min(limits), rule.gradient_accumulation_steps or 1
    num_sequences = -(-rule.batch_size // (world_size * num_microbatches))
    if budget is not None:
        num_sequences = min(budget // length, num_sequences)
    is_split = budget is not None or num_microbatches > 1
    return MicrobatchShape([length] * num_sequences, [length] * num_sequences, 2 if is_split else 1)


def model_lengths(num_tokens: ArrayLike) -> NDArray[np.integer[Any]]:
    """Tokens of rows as the model sees them: the last token of a row is only a label."""
    lengths: NDArray[np.integer[Any]] = np.maximum(np.asarray(num_tokens) - 1, 1)
    return lengths


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: which examples, on which rank, in which microbatch.

    Attributes:
        ranks: `ranks[rank][microbatch]` lists example indices, longest example first. Every rank has the same number
            of microbatches; where a rank has too few sequences for that, its last ones are empty.
        totals: Over all ranks.
    """

    ranks: list[list[list[int]]]
    totals: StepTotals


class BatchPlan:
    """Every optimizer step of a run, as a pure function of its arguments.

    Each epoch's order follows from `(seed, epoch)` and is cut into steps of `batch_size` sequences; neither depends on
    the number of ranks or on how a step is split. Within a step the sequences are dealt to ranks so that tokens are
    balanced, sorted by length on each rank, and cut into microbatches: a single one if no rule is given.

    Args:
        lengths: Tokens of each example as the model sees it, `(num_examples,)`; at least one.
        num_response_tokens: Labels of each example that count in the loss, `(num_examples,)`.
        rule: How they are put into steps and microbatches.
        world_size: Number of ranks.
        shuffle: Whether each epoch has an order of its own. If not, it is the order of the data.
        limit_steps_per_epoch: Take only this many steps of each epoch's order; all if None.
        sources: Where examples come from several sources, one after another. None: each epoch takes every example once.

    Attributes:
        steps_per_epoch: Optimizer steps in each epoch.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        num_response_tokens: ArrayLike,
        rule: StepRule,
        *,
        world_size: int = 1,
        shuffle: bool = True,
        limit_steps_per_epoch: int | None = None,
        sources: Sequence[SourceShare] | None = None,
    ) -> None:
        self._lengths = np.array(lengths, dtype=np.int32)  # kept for every example of a data set: small numbers
        self._num_response_tokens = np.array(num_response_tokens, dtype=np.int32)
        longest = int(self._lengths.argmax())
        budget = rule.max_tokens_per_microbatch
        if budget is not None and self._lengths[longest] > budget:
            raise SettingsError(
                f"`max_tokens_per_microbatch` is {budget}, but example {longest} has "
                f"{self._lengths[longest]} tokens. Raise `max_tokens_per_microbatch` to at least that, "
                "or lower `max_length`."
            )
        self._rule, self._world_size, self._shuffle = rule, world_size, shuffle
        self._sources = sources or [SourceShare(self._lengths.size, self._lengths.size)]
        self.steps_per_epoch = -(-sum(source.num_taken for source in self._sources) // rule.batch_size)
        if limit_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, limit_steps_per_epoch)
        self._latest: tuple[int, NDArray[np.int32]] | None = None  # the epoch last asked for, and its order

    def totals(self) -> StepTotals:
        """What the examples of the first epoch hold together."""
        return self._totals(self._order(0))

    def _totals(self, examples: NDArray[np.int32]) -> StepTotals:
        lengths = self._lengths[examples].astype(np.int64)  # their squares do not fit into 32 bits
        return StepTotals(
            num_sequences=examples.size,
            num_tokens=int(lengths.sum()),
            num_response_tokens=int(self._num_response_tokens[examples].sum(dtype=np.int64)),
            num_attended=int((lengths * (lengths + 1)).sum()) // 2,
        )

    def largest_microbatch(self, num_steps: int, layout: Layout = "padded") -> MicrobatchShape:
        """The microbatch that occupies most tokens in the first steps."""
        largest, cost = MicrobatchShape([], [], 0), 0
        for index in range(num_steps):
            for microbatches in self.step(index, layout).ranks:
                for examples in microbatches:
                    lengths = self._lengths[examples].tolist()
                    if lengths and (found := microbatch_cost(lengths, 0, len(lengths), layout)) > cost:
                        responses = self._num_response_tokens[examples].tolist()
                        largest, cost = MicrobatchShape(lengths, responses, len(microbatches)), found
        return largest

    def step(self, index: int, layout: Layout = "padded") -> StepPlan:
        """Plan one optimizer step.

        Args:
            index: Counts optimizer steps over the whole run, from 0; the epoch is `index // steps_per_epoch`.
            layout: Of the microbatches; it decides what they cost, not which sequences are in the step.
        """
        epoch, step_in_epoch = divmod(index, self.steps_per_epoch)
        start = step_in_epoch * self._rule.batch_size
        examples = self._order(epoch)[start : start + self._rule.batch_size]
        examples = examples[np.argsort(-self._lengths[examples], kind="stable")]
        lengths = self._lengths[examples].tolist()
        dealt = [examples[positions] for positions in deal_to_ranks(lengths, self._world_size)]
        cuts = self._cut([self._lengths[on_rank].tolist() for on_rank in dealt], layout)
        ranks = [
            [on_rank[start:end].tolist() for start, end in pairwise(rank_cuts)]
            for on_rank, rank_cuts in zip(dealt, cuts, strict=True)
        ]
        most = max(len(microbatches) for microbatches in ranks)
        for microbatches in ranks:
            microbatches.extend([] for _ in range(most - len(microbatches)))
        return StepPlan(ranks, self._totals(examples))

    def _order(self, epoch: int) -> NDArray[np.int32]:
        """The examples of one epoch in order; kept until another epoch is asked for."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = None  # not two orders at once
            order = epoch_order(self._sources, self._rule.seed if self._shuffle else None, epoch)
            self._latest = epoch, order
        return self._latest[1]

    def _cut(self, ranks: list[list[int]], layout: Layout) -> list[list[int]]:
        """The cuts of each rank's lengths, by the rule, into as many microbatches on every rank as can be."""
        budget = self._rule.max_tokens_per_microbatch
        if budget is None:
            return [cut_by_count(lengths, self._rule.gradient_accumulation_steps or 1, layout) for lengths in ranks]
        cuts = [cut_by_cost(lengths, budget, layout) for lengths in ranks]
        most = max(len(rank_cuts) for rank_cuts in cuts) - 1
        return [
            rank_cuts if len(rank_cuts) - 1 == most else cut_by_count(lengths, most, layout)
            for lengths, rank_cuts in zip(ranks, cuts, strict=True)
        ]
