"""Metrics over response tokens, exact over batches and devices."""

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
    nll: Tensor
    entropy: Tensor
    num_top1: Tensor
    num_tokens: Tensor
    num_sequences: Tensor

    def __init__(self, loss_scale: LossScale) -> None:
        super().__init__()
        self.loss_scale = loss_scale
        for name in ("nll", "entropy", "num_top1", "num_tokens", "num_sequences"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: ResponseScores, num_sequences: int) -> None:
        """Add the response tokens of some sequences; their scores must have `is_top1`."""
        assert scores.is_top1 is not None
        # Not in place: tensors of an evaluation in inference mode could not be changed outside of it.
        self.nll = self.nll - scores.log_probs.sum()
        self.entropy = self.entropy + scores.token_entropy.sum()
        self.num_top1 = self.num_top1 + scores.is_top1.sum()
        self.num_tokens = self.num_tokens + len(scores.log_probs)
        self.num_sequences = self.num_sequences + num_sequences

    def compute(self) -> dict[str, Tensor]:
        """`loss`, `perplexity`, `token_accuracy` and `token_entropy` over everything seen on all devices."""
        return {
            "loss": self.nll / self.loss_scale.divisor(self.num_tokens, self.num_sequences),
            "perplexity": (self.nll / self.num_tokens).exp(),
            "token_accuracy": self.num_top1 / self.num_tokens,
            "token_entropy": self.entropy / self.num_tokens,
        }
