"""What an optimizer step came to: a loss and a gradient norm that have to be finite numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class StepOutcome:
    """Loss and gradient norm of one optimizer step, left on the device until somebody asks.

    Attributes:
        step: Counts optimizer steps from 1.
        rows: Where this device's rows come from, such as `line 3 of train.jsonl`.
        loss: Of the step, over all devices.
        grad_norm: Before clipping; None until it is known, or where it does not matter.
    """

    step: int
    rows: Sequence[str]
    loss: Tensor
    grad_norm: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        """Waits for the device."""
        norm = self.loss if self.grad_norm is None else self.grad_norm
        return bool(torch.isfinite(self.loss) & torch.isfinite(norm))

    def check(self) -> None:
        """Waits for the device.

        Raises:
            FloatingPointError: If a number is not finite.
        """
        if self.is_finite:
            return
        named = ", ".join(self.rows[:8]) + (f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else "")
        norm = "" if self.grad_norm is None else f" and the gradient norm {self.grad_norm.item():g}"
        raise FloatingPointError(
            f"Optimizer step {self.step} has the loss {self.loss.item():g}{norm}; its rows on this device: {named}. No "
            "checkpoint holds the step. Look at the rows, lower the learning rate, or set `nonfinite` to 'skip'."
        )
