"""`GradScaling`: the scale under which float16 can hold small gradients."""

import lightning as L
import torch
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
