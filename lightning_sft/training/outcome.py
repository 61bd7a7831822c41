"""What an optimizer step came to: a loss and a gradient norm that have to be finite numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_sft.errors import SettingsError


class NonFiniteError(SettingsError, FloatingPointError):
    """The loss or the gradient norm of an optimizer step is no finite number."""


class OnItsWay:
    """A tensor that is copied to the host once it is computed. Reading it waits for that, not for what comes after."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # from CUDA: to pinned memory
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


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
    _sent: OnItsWay | None = field(default=None, init=False)

    def send(self) -> None:
        """Copy the numbers to the host when they are there."""
        self._sent = OnItsWay(self._numbers())

    def _numbers(self) -> Tensor:
        return self.loss if self.grad_norm is None else torch.stack([self.loss, self.grad_norm.to(self.loss.dtype)])

    @property
    def is_finite(self) -> bool:
        """Waits for the device, or for the numbers alone if they were sent before."""
        numbers = self._numbers() if self._sent is None else self._sent.read()
        return bool(numbers.isfinite().all())

    def check(self) -> None:
        """Waits as `is_finite` does.

        Raises:
            NonFiniteError: If a number is not finite.
        """
        if self.is_finite:
            return
        named = ", ".join(self.rows[:8]) + (f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else "")
        norm = "" if self.grad_norm is None else f" and the gradient norm {self.grad_norm.item():g}"
        raise NonFiniteError(
            f"Optimizer step {self.step} has the loss {self.loss.item():g}{norm}; its rows on this device: {named}. No "
            "checkpoint holds the step. Look at the rows, lower the learning rate, or set `nonfinite` to 'skip'."
        )
