"""What a split holds, in numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SplitStatistics:
    """What a split holds.

    Attributes:
        num_tokens: Of each row, prompt and response, `(num_rows,)`.
        num_response_tokens: Of each row, the labels that count in the loss, `(num_rows,)`.
        num_dropped: Rows of its data that were too long.
        num_truncated: Rows of its data that were cut.
        steps_per_epoch: Optimizer steps; None if the split is not trained on, or nobody knows.
        sources: How many rows it has of each source; empty if an epoch takes every row once.
    """

    num_tokens: NDArray[np.integer[Any]]
    num_response_tokens: NDArray[np.integer[Any]]
    num_dropped: int = 0
    num_truncated: int = 0
    steps_per_epoch: int | None = None
    sources: Mapping[str, int] = field(default_factory=dict)
