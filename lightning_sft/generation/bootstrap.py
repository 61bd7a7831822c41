"""How sure a mean is: the percentile bootstrap."""

import math
from collections.abc import Sequence

import numpy as np

_MANY = 500  # distinct values from which on drawing them one by one is faster


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean: values are drawn with replacement, as many as there are.

    Args:
        values: One of each thing that is drawn, such as a prompt.
        confidence: How often such an interval holds the mean over all things there could be.
        num_resamples: Means that are drawn.
        seed: Of the draws.

    Returns:
        Lower and upper bound; NaN and NaN without values.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    n, rng = len(values), np.random.default_rng(seed)
    if not n:
        return math.nan, math.nan
    # How often each distinct value is drawn is multinomial: as exact as drawing one by one, and faster for few of them.
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < _MANY:
        means = [rng.multinomial(n, counts / n) @ distinct / n for _ in range(num_resamples)]
    else:
        means = [np.take(values, rng.integers(n, size=n)).mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
