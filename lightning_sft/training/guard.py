"""`StepGuard`: optimizer steps whose loss or gradient norm is not a finite number stop the run, or are skipped."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
        """Count from here.

        Args:
            num_steps: Optimizer steps that were taken before, such as those of the checkpoint that a run continues.
            num_skipped: Those of them that were skipped.
        """
        self.num_steps, self.num_skipped = num_steps, num_skipped
        self.allowed = True
        self.known_loss: Tensor | None = None
        self._announced = _Announced()
        self._unchecked: _StepNumbers | None = None

    def announce(self, loss: Tensor, locations: Sequence[str]) -> None:
        """Tell what the next step will be checked for, beside its gradients.

        Args:
            loss: The step's, over all devices, a scalar.
            locations: Where this device's rows come from.
        """
        self._announced = _Announced(loss, locations)

    def allows(self, step: int, grad_norm: Tensor, *, is_scaled: bool) -> bool:
        """Whether the optimizer may use the gradients of the step that it is about to take, which is counted.

        Args:
            step: Its number, from 1.
            grad_norm: Before clipping, a scalar.
            is_scaled: Whether a loss scaler leaves out what overflows float16, which is no error and not skipped.

        Raises:
            NonFiniteError: Under `error`: this step on the CPU, the one before it on a device.
        """
        overflows = is_scaled and not bool(grad_norm.isfinite())
        numbers = _StepNumbers(step, None if overflows else grad_norm, self._announced)
        earlier, self._unchecked, self._announced = self._unchecked, numbers, _Announced()
        if self.skips:
            is_finite = self._are_finite(numbers)
            self.num_skipped += not is_finite
        else:
            is_finite = True
            numbers.copy_to_host()
            if earlier is not None:
                self._check(earlier)
            if grad_norm.device.type == "cpu":
                self.check()
        self.num_steps = step
        self.allowed = is_finite and not overflows
        return self.allowed

    def check(self) -> None:
        """Check the latest step, if that is still to be done; this waits for the device.

        Raises:
            NonFiniteError: Under `error`.
        """
        step, self._unchecked = self._unchecked, None
        if step is not None and not self.skips:
            self._check(step)

    def _are_finite(self, step: "_StepNumbers") -> bool:
        numbers = step.on_host()
        self.known_loss = None if step.announced.loss is None else numbers[0]
        return bool(numbers.isfinite().all())

    def _check(self, step: "_StepNumbers") -> None:
        if not self._are_finite(step):
            raise step.error()


@dataclass(frozen=True)
class _Announced:
    """See `StepGuard.announce`; nothing is known of a step that a subclass takes in a `training_step` of its own."""

    loss: Tensor | None = None
    locations: Sequence[str] = ()


@dataclass
class _StepNumbers:
    """What an optimizer step is checked for."""

    step: int
    grad_norm: Tensor | None  # None where the gradients overflowed
    announced: _Announced
    _copy: HostCopy | None = field(default=None, init=False)

    def copy_to_host(self) -> None:
        self._copy = HostCopy(self._stacked())

    def on_host(self) -> Tensor:
        """In main memory. This waits for the device; after `copy_to_host`, for that copy alone."""
        return self._stacked().cpu() if self._copy is None else self._copy.read()

    def error(self) -> NonFiniteError:
        numbers = " and ".join(f"the {name} {number.item():g}" for name, number in self._numbers().items())
        locations = self.announced.locations
        rows = f"; its rows on this device: {', '.join(locations[:8])}" if locations else ""
        rows += f" and {len(locations) - 8} more" if len(locations) > 8 else ""
        return NonFiniteError(
            f"Optimizer step {self.step} has {numbers}{rows}. No checkpoint holds the step. Look at the rows, lower "
            "the learning rate, or set `nonfinite` to 'skip'."
        )

    def _numbers(self) -> dict[str, Tensor]:
        numbers = {"loss": self.announced.loss, "gradient norm": self.grad_norm}
        return {name: number.double() for name, number in numbers.items() if number is not None}

    def _stacked(self) -> Tensor:
        numbers = list(self._numbers().values())
        return torch.stack(numbers) if numbers else torch.zeros(0)
