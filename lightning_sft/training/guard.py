"""`StepGuard`: optimizer steps whose loss or gradient norm is not a finite number stop the run, or are skipped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_sft.checks import check_choice
from lightning_sft.errors import SettingsError
from lightning_sft.training.host_copy import HostCopy

NonFinite = Literal["error", "skip"]


class NonFiniteError(SettingsError, FloatingPointError):
    """The loss or the gradient norm of an optimizer step is not a finite number."""


class StepGuard:
    """Checks each optimizer step before the optimizer takes it, and counts them.

    The numbers to check are on the device. Under `error`, reading them at once would make the host wait for the device
    in every step. So a step is checked when the following one is about to be taken, and by `check` before anything
    relies on the weights; on the CPU, where nothing waits, at once. Under `skip`, the numbers decide whether the
    optimizer steps, so the host waits.

    Args:
        nonfinite: `error`: raise a `NonFiniteError`. `skip`: leave weights, optimizer and schedule as they are.

    Attributes:
        skips: Whether `nonfinite` is `skip`.
        num_steps: Optimizer steps that led to the present weights, skipped ones included.
        num_skipped: Those of them that `skip` left out.
        known_loss: Of the latest checked step, a scalar in main memory; None if no loss was announced. On a device
            under `error` that is the step before the present one.
        allowed: Whether the optimizer could use the gradients of the latest step.
    """

    def __init__(self, nonfinite: NonFinite) -> None:
        check_choice("nonfinite", nonfinite, NonFinite)
        self.skips = nonfinite == "skip"
        self.start_run(0, 0)

    def start_run(self, num_steps: int, num_skipped: int) -> None:
        """Count from here: so many optimizer steps were taken before, and so many of them were skipped."""
        self.num_steps, self.num_skipped = num_steps, num_skipped
        self.allowed = True
        self.known_loss: Tensor | None = None
        self._unchecked: _Step | None = None
        self.announce(None, ())

    def announce(self, loss: Tensor | None, locations: Sequence[str]) -> None:
        """Tell what the next step will be checked for, beside its gradients.

        Args:
            loss: The step's, over all devices, a scalar. None: it is not known, as that of a step which a subclass
                takes in a `training_step` of its own.
            locations: Where this device's rows come from.
        """
        self._loss, self._locations = loss, locations

    def allows(self, step: int, grad_norm: Tensor, *, is_scaled: bool) -> bool:
        """Whether the optimizer may use the gradients of the step that it is about to take, number `step` from 1.

        The gradient norm is that before clipping. With `is_scaled` a loss scaler leaves out what overflows float16,
        which is no error and not counted as skipped.
        """
        overflows = is_scaled and not bool(grad_norm.isfinite())
        found = {"loss": self._loss, "gradient norm": None if overflows else grad_norm}
        numbers = {name: number.double() for name, number in found.items() if number is not None}
        stacked = torch.stack(list(numbers.values())) if numbers else torch.zeros(0)
        present = _Step(step, list(numbers), HostCopy(stacked.cpu() if self.skips else stacked), self._locations)
        self.announce(None, ())
        is_finite = True
        if self.skips:
            is_finite = self._is_finite(present)
            self.num_skipped += not is_finite
        else:
            self._check_latest(present)
            if grad_norm.device.type == "cpu":
                self.check()
        self.num_steps = step
        self.allowed = is_finite and not overflows
        return self.allowed

    def check(self) -> None:
        """Check the latest step, if that is still to be done; this waits until its numbers have been computed."""
        self._check_latest(None)

    def _check_latest(self, following: "_Step | None") -> None:
        # A following step is to be checked even if this one is refused: its weights may be saved on the exception.
        step, self._unchecked = self._unchecked, following
        if step is not None and not self._is_finite(step):
            raise step.error()

    def _is_finite(self, step: "_Step") -> bool:
        numbers = step.numbers.read()
        self.known_loss = numbers[0] if "loss" in step.names else None
        return bool(numbers.isfinite().all())


@dataclass(frozen=True)
class _Step:
    """An optimizer step that is to be checked.

    Attributes:
        number: From 1.
        names: Of the numbers that it is checked for.
        numbers: These, in the same order.
        locations: Where this device's rows come from.
    """

    number: int
    names: list[str]
    numbers: HostCopy
    locations: Sequence[str]

    def error(self) -> NonFiniteError:
        """What a user is told of it."""
        values = zip(self.names, self.numbers.read().tolist(), strict=True)
        numbers = " and ".join(f"the {name} {value:g}" for name, value in values)
        rows = f"; its rows on this device: {', '.join(self.locations[:8])}" if self.locations else ""
        rows += f" and {len(self.locations) - 8} more" if len(self.locations) > 8 else ""
        return NonFiniteError(
            f"Optimizer step {self.number} has {numbers}{rows}. No checkpoint holds the step. Look at the rows, lower "
            "the learning rate, or set `nonfinite` to 'skip'."
        )
