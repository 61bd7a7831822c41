"""Metrics over response tokens, exact over batches and devices."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sft.model.head import ResponseScores
from lightning_sft.training.losses import LossScale


class ResponseMetrics(Metric):
    """Loss, perplexity, accuracy and entropy over response tokens: sums and counts, divided once.

    Args:
        loss_scale: What `loss` is divided by, as in training; the other metrics are always per token.
    """

    full_state_update = False
    sums: Tensor  # of each set of rows, `(num_sets, 5)`, in the order of `_metrics`

    def __init__(self, loss_scale: LossScale) -> None:
        super().__init__()
        self.loss_scale = loss_scale
        self.begin()

    def begin(self, names: Sequence[str] = ()) -> None:
        """Begin anew, over rows of several sets with these names, or without names over one set."""
        self.names = names
        sums = torch.zeros(len(names) or 1, 5, dtype=torch.float64, device=self.device)
        self.add_state("sums", sums, dist_reduce_fx="sum")

    def update(self, scores: ResponseScores, num_sequences: int, index: int = 0) -> None:
        """Add the response tokens of some sequences of a set; their scores must have `is_top1`."""
        assert scores.is_top1 is not None
        counts = (torch.full_like(self.sums[0, 0], count) for count in (len(scores.log_probs), num_sequences))
        sums = torch.stack([-scores.log_probs.sum(), scores.token_entropy.sum(), scores.is_top1.sum(), *counts])
        is_of_set = torch.arange(len(self.sums), device=self.sums.device) == index
        # Not in place: tensors of an evaluation in inference mode could not be changed outside of it.
        self.sums = torch.where(is_of_set[:, None], self.sums + sums, self.sums)

    def compute(self) -> dict[str, Tensor]:
        """`loss`, `perplexity`, `token_accuracy` and `token_entropy` over everything seen on all devices.

        Those of a set alone begin with its name, such as `math/loss`.
        """
        metrics = self._metrics(self.sums.sum(dim=0))
        for name, sums in zip(self.names, self.sums, strict=False):
            metrics |= {f"{name}/{metric}": value for metric, value in self._metrics(sums).items()}
        return metrics

    def _metrics(self, sums: Tensor) -> dict[str, Tensor]:
        nll, entropy, num_top1, num_tokens, num_sequences = sums
        return {
            "loss": nll / self.loss_scale.divisor(num_tokens, num_sequences),
            "perplexity": (nll / num_tokens).exp(),
            "token_accuracy": num_top1 / num_tokens,
            "token_entropy": entropy / num_tokens,
        }
