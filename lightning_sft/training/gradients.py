"""What is done to gradients before the optimizer uses them: the scale of float16, and clipping."""

from collections.abc import Iterable

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class GradScaling:
    """What the scale of `16-mixed` asks of an optimizer step; under other precisions it asks for nothing.

    Args:
        trainer: Whose precision counts.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale where Lightning leaves that to a fused optimizer: too late for clipping."""
        if self._scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Let the optimizer step.

        Returns:
            Whether it did. Where gradients overflow float16, the scale is lowered instead, for the steps to come.
        """
        scale = 0.0 if self._scaler is None else self._scaler.get_scale()
        optimizer.step()
        return self._scaler is None or self._scaler.get_scale() >= scale


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients, whole or sharded, down to a total norm, if there is one; return the norm before, a scalar."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
