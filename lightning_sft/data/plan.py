"""The plan of optimizer steps: which examples form a step, on which rank, in which microbatch."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise
from math import gcd
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lightning_sft.checks import check_integer
from lightning_sft.errors import SettingsError

Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class StepRule:
    """How sequences are put into optimizer steps, and steps into microbatches.

    Args:
        batch_size: Sequences per optimizer step, over all ranks. The last step of an epoch may have fewer.
        gradient_accumulation_steps: Microbatches per rank and step; fewer where a step has not enough sequences.
        max_tokens_per_microbatch: Split by memory instead: the most tokens, padding included, in a microbatch. If
            neither is given, a step is one microbatch on each rank.
        seed: Of the order.

    Raises:
        SettingsError: If a number is of another type or too small, or both rules for microbatches are given.
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
                f"is {self.max_tokens_per_microbatch}, but each alone decides the microbatches. Give one of them."
            )


@dataclass  # not frozen, like all that a batch is made of: under `bf16-true` Lightning copies it field by field
class StepTotals:
    """What sequences hold together: those of an optimizer step over all ranks, or those of many steps.

    Attributes:
        num_sequences: How many there are.
        num_tokens: Inputs of the model, prompts and responses, without padding.
        num_response_tokens: Labels that count in the loss.
        num_attended: Pairs of a token and one that it attends to, itself included, in causal attention over each
            sequence.
    """

    num_sequences: int = 0
    num_tokens: int = 0
    num_response_tokens: int = 0
    num_attended: int = 0

    def __add__(self, other: "StepTotals") -> "StepTotals":
        return StepTotals(
            self.num_sequences + other.num_sequences,
            self.num_tokens + other.num_tokens,
            self.num_response_tokens + other.num_response_tokens,
            self.num_attended + other.num_attended,
        )

    def times(self, factor: float) -> "StepTotals":
        """What so many times as much holds, rounded."""
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


def microbatch_cost(lengths: Sequence[int], start: int, end: int, layout: Layout) -> int:
    """Tokens that sequences `start:end` of `lengths` (longest first) occupy as one microbatch, padding included.

    Padded: `num_sequences * longest`; packed: their sum. The cuts below rely on one thing: dropping a sequence from
    either end never costs more.
    """
    return sum(lengths[start:end]) if layout == "packed" else (end - start) * lengths[start]


def deal_to_ranks(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal sequences out, each to the rank with the fewest tokens so far; of equals, the fewest sequences, the lowest.

    The ranks' totals then differ by no more than the longest sequence, and no rank stays empty while there are at
    least `world_size` sequences.

    Args:
        lengths: Tokens of each sequence, longest first.
        world_size: Number of ranks.

    Returns:
        For each rank the positions in `lengths` that it gets, ascending.
    """
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, 0, rank) for rank in range(world_size)]  # a heap of (tokens, sequences, rank)
    for position, length in enumerate(lengths):
        num_tokens, num_sequences, rank = loads[0]
        dealt[rank].append(position)
        heapreplace(loads, (num_tokens + length, num_sequences + 1, rank))
    return dealt


def cut_by_cost(lengths: Sequence[int], budget: int, layout: Layout = "padded") -> list[int]:
    """Cut sequences into the fewest contiguous microbatches that cost at most `budget` each, filling one by one.

    Args:
        lengths: Tokens of each sequence, longest first, none longer than `budget`.
        budget: Tokens, as `microbatch_cost` counts them.
        layout: Of the microbatch.

    Returns:
        The cuts: microbatch `i` is `lengths[cuts[i]:cuts[i + 1]]`.
    """
    cuts = [0]
    while (start := cuts[-1]) < len(lengths):
        fitting = bisect_right(
            range(start + 2, len(lengths) + 1), budget, key=lambda end: microbatch_cost(lengths, start, end, layout)
        )
        cuts.append(start + 1 + fitting)
    return cuts


def cut_by_count(lengths: Sequence[int], count: int, layout: Layout = "padded") -> list[int]:
    """Cut sequences into exactly `min(count, len(lengths))` contiguous microbatches, the costliest as cheap as can be.

    Args:
        lengths: Tokens of each sequence, longest first.
        count: Number of microbatches wanted.
        layout: Of the microbatch.

    Returns:
        The cuts, as `cut_by_cost` gives them.
    """
    if count >= len(lengths):
        return list(range(len(lengths) + 1))
    budgets = range(lengths[0], microbatch_cost(lengths, 0, len(lengths), layout) + 1)
    enough = bisect_left(budgets, True, key=lambda budget: len(cut_by_cost(lengths, budget, layout)) - 1 <= count)
    cuts = cut_by_cost(lengths, budgets[enough], layout)
    while len(cuts) - 1 < count:
        splittable = [pair for pair in pairwise(cuts) if pair[1] - pair[0] > 1]
        start, end = max(splittable, key=lambda pair: microbatch_cost(lengths, pair[0], pair[1], layout))
        middles = range(start + 1, end)
        costs = [
            max(microbatch_cost(lengths, start, at, layout), microbatch_cost(lengths, at, end, layout))
            for at in middles
        ]
        insort(cuts, middles[costs.index(min(costs))])
    return cuts


def epoch_order(sources: Sequence[tuple[int, int]], seed: int | None, epoch: int) -> np.ndarray:
    """The examples of an epoch in order: those of each source (`source_order`), all shuffled together.

    Args:
        sources: Of each, how many examples it has and how many of these an epoch takes.
        seed: Of the order; None: every epoch takes the first of each source, in the order of the data.
        epoch: Counts from 0.
    """
    if len(sources) == 1:
        order = source_order(*sources[0], None if seed is None else [seed, 0], epoch)
    else:
        order, at, start = np.empty(sum(taken for _, taken in sources), dtype=np.int32), 0, 0
        for number, (size, taken) in enumerate(sources):
            order[at : at + taken] = source_order(size, taken, None if seed is None else [seed, number], epoch)
            order[at : at + taken] += start
            at, start = at + taken, start + size
    if seed is not None:
        np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def source_order(size: int, taken: int, seed: Sequence[int] | None, epoch: int) -> np.ndarray:
    """Which of a source's examples an epoch takes: it goes on in a shuffled order where the epoch before stopped.

    At the order's end it begins again, so within any stretch of epochs, a single one too, examples are taken equally
    often, give or take one. A new order is drawn whenever an epoch begins with one; drawn earlier, its first examples
    could be those that the same epoch has just taken.

    Args:
        size: Examples of the source.
        taken: How many of them an epoch takes, perhaps more than there are.
        seed: Of the orders; None: every epoch takes the first examples.
        epoch: Counts from 0.

    Returns:
        Indices, `(taken,)`.
    """
    order = np.arange(size, dtype=np.int32)
    if seed is not None and taken % size:  # whole rounds take the same, whatever their order
        start = epoch * taken % size
        num_orders = epoch // (size // gcd(size, taken))
        np.random.default_rng([*seed, num_orders, 1]).shuffle(order)  # a last 0 would be as good as none
        order = np.roll(order, -start)
    return order if taken == size else np.resize(order, taken)


class BatchPlan:
    """Every optimizer step of a run, as a pure function of its arguments.

    Each epoch's order follows from `(seed, epoch)` and is cut into steps of `batch_size` sequences; neither depends on
    the number of ranks or on how a step is split. Within a step the sequences are dealt to ranks so that tokens are
    balanced, sorted by length on each rank, and cut into microbatches: a single one if no rule is given.

    Args:
        lengths: Tokens of each example as the model sees it, `(num_examples,)`.
        num_response_tokens: Labels of each example that count in the loss, `(num_examples,)`.
        rule: How they are put into steps and microbatches.
        world_size: Number of ranks.
        shuffle: Whether each epoch has an order of its own. If not, it is the order of the data.
        limit_steps_per_epoch: Take only this many steps of each epoch's order; all if None.
        sources: Where examples come from several sources, one after another: of each, how many it has and how many of
            these an epoch takes (`source_order`). None: each epoch takes every example once.

    Attributes:
        steps_per_epoch: Optimizer steps in each epoch.

    Raises:
        TypeError: If an argument is no whole number.
        ValueError: If there are no examples, the arrays differ in shape, a number is too small, both microbatch rules
            are given, or an example is longer than `max_tokens_per_microbatch`.
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
        sources: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        check_integer("world_size", world_size, at_least=1)
        check_integer("limit_steps_per_epoch", limit_steps_per_epoch, at_least=1, optional=True)
        self._lengths = np.array(lengths, dtype=np.int32)  # kept for every example of a data set: small numbers
        self._num_response_tokens = np.array(num_response_tokens, dtype=np.int32)
        if self._lengths.shape != self._num_response_tokens.shape or self._lengths.ndim != 1:
            raise SettingsError(
                "`lengths` and `num_response_tokens` must have one number for each example, but their shapes are "
                f"{self._lengths.shape} and {self._num_response_tokens.shape}."
            )
        if self._lengths.size == 0:
            raise SettingsError("`lengths` is empty; expected at least one example. Check the training data.")
        longest = int(self._lengths.argmax())
        budget = rule.max_tokens_per_microbatch
        if budget is not None and self._lengths[longest] > budget:
            raise SettingsError(
                f"`max_tokens_per_microbatch` is {budget}, but example {longest} has "
                f"{self._lengths[longest]} tokens. Raise `max_tokens_per_microbatch` to at least that, "
                "or lower `max_length`."
            )
        self._rule, self._world_size = rule, world_size
        self._shuffle = shuffle
        self._sources = sources or [(self._lengths.size, self._lengths.size)]
        self.steps_per_epoch = -(-sum(taken for _, taken in self._sources) // rule.batch_size)
        if limit_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, limit_steps_per_epoch)
        self._latest: tuple[int, np.ndarray] | None = None  # the epoch last asked for, and its order

    def totals(self) -> StepTotals:
        """Of an epoch."""
        return self._totals(self._order(0))

    def _totals(self, examples: np.ndarray) -> StepTotals:
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

        Raises:
            ValueError: If `index` is negative.
        """
        if index < 0:
            raise SettingsError(f"`index` counts optimizer steps from 0, but it is {index}.")
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

    def _order(self, epoch: int) -> np.ndarray:
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
