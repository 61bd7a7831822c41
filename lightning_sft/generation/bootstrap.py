"""How sure a mean is: the percentile bootstrap."""

import math
from collections.abc import Sequence

import numpy as np

_NUM_RESAMPLES = 10_000
_MANY = 500  # distinct values from which on drawing them one by one is faster


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """95% percentile bootstrap interval of a mean: values are drawn with replacement, as many as there are.

    10,000 means are drawn, by a fixed seed: the same values always give the same interval.

    Args:
        values: One of each thing that is drawn, such as a prompt.

    Returns:
        Lower and upper bound; NaN and NaN without values.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    n, rng = len(values), np.random.default_rng(0)
    if not n:
        return math.nan, math.nan
    # How often each distinct value is drawn is multinomial: as exact as drawing one by one, and faster for few of them.
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < _MANY:
        means = [rng.multinomial(n, counts / n) @ distinct / n for _ in range(_NUM_RESAMPLES)]
    else:
        means = [np.take(values, rng.integers(n, size=n)).mean() for _ in range(_NUM_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
