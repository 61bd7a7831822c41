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
    """Checks each optimizer step, and counts them.

    The numbers to check are on the device. Under `error`, reading them at once would make the host wait for the device
    in every step. So a step is checked after the following one has been handed to the device, and by `check` before
    anything relies on the weights. Under `skip`, the numbers decide whether the optimizer steps, so the host waits.

    Args:
        nonfinite: `error`: raise a `NonFiniteError`. `skip`: leave weights, optimizer and schedule as they are.

    Attributes:
        skips: Whether `nonfinite` is `skip`.
        num_steps: Optimizer steps that led to the present weights, skipped ones included.
        num_skipped: Those of them that `skip` left out.
        known_loss: Of the latest checked step, a scalar in main memory; None before the first. On a device under
            `error` that is the step before the present one.
    """

    def __init__(self, nonfinite: NonFinite) -> None:
        check_choice("nonfinite", nonfinite, NonFinite)
        self.skips = nonfinite == "skip"
        self.num_steps = 0
        self.num_skipped = 0
        self.known_loss: Tensor | None = None
        self._latest: _StepNumbers | None = None
        self._earlier: _StepNumbers | None = None

    def start_run(self, num_steps: int, num_skipped: int) -> None:
        """Count from here.

        Args:
            num_steps: Optimizer steps that were taken before, such as those of the checkpoint that a run continues.
            num_skipped: Those of them that were skipped.
        """
        self.num_steps, self.num_skipped = num_steps, num_skipped
        self._latest = self._earlier = self.known_loss = None

    def start_step(self, step: int, locations: Sequence[str], loss: Tensor) -> None:
        """Take note of an optimizer step before the optimizer does it.

        `step` counts from 1, `locations` say where this device's rows come from, and `loss` is that over all devices.
        """
        self._earlier, self._latest = self._latest, _StepNumbers(step, locations, loss)

    def allows(self, grad_norm: Tensor) -> bool:
        """Whether the optimizer may use the gradients. Under `error` it always may: `finish_step` and `check` raise.

        Args:
            grad_norm: Of the step that was started, if one was, before clipping; a scalar.
        """
        if self._latest is None:  # a subclass's own step, of which nothing else is known
            return not self.skips or bool(grad_norm.isfinite())
        self._latest.grad_norm = grad_norm
        return not self.skips or self._are_finite(self._latest)

    def finish_step(self, stepped: bool) -> bool:
        """Count the step that was started, and check the one before it; on the CPU, where nothing waits, this one too.

        Args:
            stepped: False if the optimizer did nothing because gradients overflowed float16, which is no error.

        Returns:
            Whether the optimizer has changed the weights.

        Raises:
            NonFiniteError: Under `error`.
            SettingsError: If nobody has asked whether the gradients may be used.
        """
        step = self._latest
        assert step is not None, "`start_step` comes first"
        if step.grad_norm is None:
            raise SettingsError(
                "`on_before_optimizer_step` of a subclass does not call `super().on_before_optimizer_step(optimizer)`, "
                "which clips the gradients. Call it, before or after what is done there."
            )
        self.num_steps = step.step
        if not stepped:
            step.grad_norm = None
        if self.skips:
            is_finite = self._are_finite(step)
            self.num_skipped += not is_finite
            return is_finite and stepped
        step.copy_to_host()
        if self._earlier is not None:
            self._check(self._earlier)
        if step.loss.device.type == "cpu":
            self.check()
        return stepped

    def check(self) -> None:
        """Check the latest step, if that is still to be done; this waits for the device.

        Raises:
            NonFiniteError: Under `error`.
        """
        step, self._latest = self._latest, None
        if step is not None and not self.skips:
            self._check(step)

    def _are_finite(self, step: "_StepNumbers") -> bool:
        numbers = step.on_host()
        self.known_loss = numbers.flatten()[0]
        return bool(numbers.isfinite().all())

    def _check(self, step: "_StepNumbers") -> None:
        if not self._are_finite(step):
            raise step.error()


@dataclass
class _StepNumbers:
    """Loss and gradient norm of an optimizer step; see `StepGuard.start_step`."""

    step: int
    locations: Sequence[str]
    loss: Tensor
    grad_norm: Tensor | None = None  # None until it is known, and where the gradients overflowed
    _copy: HostCopy | None = field(default=None, init=False)

    def copy_to_host(self) -> None:
        self._copy = HostCopy(self._numbers())

    def on_host(self) -> Tensor:
        """In main memory. This waits for the device; after `copy_to_host`, for that copy alone."""
        return self._numbers().cpu() if self._copy is None else self._copy.read()

    def error(self) -> NonFiniteError:
        named = ", ".join(self.locations[:8])
        named += f" and {len(self.locations) - 8} more" if len(self.locations) > 8 else ""
        norm = "" if self.grad_norm is None else f" and the gradient norm {self.grad_norm.item():g}"
        return NonFiniteError(
            f"Optimizer step {self.step} has the loss {self.loss.item():g}{norm}; its rows on this device: {named}. No "
            "checkpoint holds the step. Look at the rows, lower the learning rate, or set `nonfinite` to 'skip'."
        )

    def _numbers(self) -> Tensor:
        return self.loss if self.grad_norm is None else torch.stack([self.loss, self.grad_norm.to(self.loss.dtype)])
