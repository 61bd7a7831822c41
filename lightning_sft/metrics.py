"""Metrics over response tokens, exact over batches and devices."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sft.losses import LossNormalization, masked_normalize


class ResponseMetrics(Metric):
    """Loss, perplexity, accuracy and entropy over response tokens: sums and counts, divided once.

    Args:
        loss_normalization: What `loss` is divided by, as in training; the other metrics are always per token.
        normalize_constant: Likewise.
    """

    full_state_update = False
    nll: Tensor
    entropy: Tensor
    num_top1: Tensor
    num_tokens: Tensor
    num_sequences: Tensor

    def __init__(self, loss_normalization: LossNormalization = "token", normalize_constant: float = 1.0) -> None:
        super().__init__()
        self._by_token, self._normalize_constant = loss_normalization == "token", normalize_constant
        for name in ("nll", "entropy", "num_top1", "num_tokens", "num_sequences"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_probs: Tensor, token_entropy: Tensor, is_top1: Tensor, response_mask: Tensor) -> None:
        """Add one microbatch; all tensors `(batch_size, sequence_length)`."""
        self.nll -= masked_normalize(log_probs, response_mask, 1.0)
        self.entropy += masked_normalize(token_entropy, response_mask, 1.0)
        self.num_top1 += (is_top1 & response_mask).sum()
        self.num_tokens += response_mask.sum()
        self.num_sequences += response_mask.any(dim=-1).sum()

    def compute(self) -> dict[str, Tensor]:
        """`loss`, `perplexity`, `token_accuracy` and `token_entropy` over everything seen on all devices."""
        by = self.num_tokens if self._by_token else self._normalize_constant * self.num_sequences
        return {
            "loss": self.nll / by,
            "perplexity": (self.nll / self.num_tokens).exp(),
            "token_accuracy": self.num_top1 / self.num_tokens,
            "token_entropy": self.entropy / self.num_tokens,
        }
