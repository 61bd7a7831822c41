"""Which examples an epoch takes, and in which order: a pure function of a seed and the epoch's number."""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class SourceShare(NamedTuple):
    """How many examples a source has, and how many of these an epoch takes."""

    num_examples: int
    num_taken: int


def epoch_order(sources: Sequence[SourceShare], seed: int | None, epoch: int) -> NDArray[np.int32]:
    """The examples of an epoch in order: those of each source (`source_order`), all shuffled together.

    Args:
        sources: Whose examples stand one after another.
        seed: Of the order; None: every epoch takes the first of each source, in the order of the data.
        epoch: Counts from 0.
    """
    parts, start = [], 0
    for number, source in enumerate(sources):
        parts.append(source_order(*source, None if seed is None else [seed, number], epoch))
        parts[-1] += start
        start += source.num_examples
    order = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if seed is not None:
        np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def source_order(size: int, taken: int, seed: Sequence[int] | None, epoch: int) -> NDArray[np.int32]:
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
