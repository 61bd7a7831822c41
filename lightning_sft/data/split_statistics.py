"""The numbers of a split."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_sft.data.encoding_report import EncodingReport


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
