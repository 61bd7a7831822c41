"""How the sequences of an optimizer step are dealt to ranks, and those of a rank cut into microbatches."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from heapq import heapreplace
from itertools import pairwise

from lightning_sft.data.tokens.microbatch import Layout


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
        layout: Of the microbatches.

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
    """As `cut_by_cost`, into exactly `min(count, len(lengths))` microbatches, the costliest as cheap as can be."""
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
