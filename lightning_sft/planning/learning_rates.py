"""`find_lr`: at which learning rates the loss falls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import lightning as L

from lightning_sft.checks import check_integer, check_type
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import SettingsError
from lightning_sft.planning.trial import Trial, run_trial
from lightning_sft.training.module import SFTModule

_SMOOTHING = 0.9  # with Lightning's 0.98 a value would mostly be losses at far lower rates, up to 50 steps back
_DIVERGED = 2.0  # times the lowest loss: a loss in nats is a logarithm, which may never reach Lightning's four times
_BELOW_LOWEST = 5.0  # the suggestion is so many times lower than the rate of the lowest loss
_LINES, _WIDTH = 25, 40  # of the text


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start: the first value is the first loss.

    Value `n` is `sum(0.9**(n - i) * losses[i]) / sum(0.9**(n - i))` over all `i <= n`.
    """
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = _SMOOTHING * total + loss, _SMOOTHING * weight + 1.0
        smoothed.append(total / weight)
    return smoothed


@dataclass(frozen=True, repr=False)
class LearningRates:
    """The losses of a learning-rate range test; `print` shows them.

    Args:
        lrs: The learning rate of each optimizer step, rising.
        losses: The loss of the following step, which is the first that shows the effect of the step.
    """

    lrs: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> list[float]:
        """The losses, smoothed."""
        return smooth(self.losses)

    @property
    def suggestion(self) -> float | None:
        """A fifth of the rate at the lowest smoothed loss, to two digits; None if no loss is lower than the first."""
        smoothed = self.smoothed
        lowest = smoothed.index(min(smoothed)) if smoothed else 0
        return float(f"{self.lrs[lowest] / _BELOW_LOWEST:.1e}") if lowest else None

    def __str__(self) -> str:
        smoothed = self.smoothed
        if not smoothed:
            return "No optimizer step had a finite loss. Lower `min_lr`, or look at the data."
        lowest, worst = smoothed.index(min(smoothed)), max(smoothed)
        every = -(-len(smoothed) // _LINES)
        shown = {*range(0, len(smoothed), every), lowest, len(smoothed) - 1}
        lines = [f"{'learning rate':>13}  {'loss':>7}"]
        for step in sorted(shown):
            bar = "█" * max(1, round(_WIDTH * smoothed[step] / worst))
            mark = " lowest" if step == lowest else ""
            lines.append(f"{self.lrs[step]:>13.1e}  {smoothed[step]:>7.3f}  {bar}{mark}")
        if self.suggestion is None:
            return "\n".join(
                [*lines, "The loss does not fall at any of these rates: lower `min_lr`, or raise `max_lr`."]
            )
        if lowest == len(smoothed) - 1:
            lines.append("The loss still falls at the highest rate: raise `max_lr`.")
        return "\n".join([*lines, f"--model.optimizer.lr {_shortest(self.suggestion)}"])

    __repr__ = __str__


def _shortest(number: float) -> str:
    """Such as 2.5e-4."""
    digits, exponent = f"{number:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


class _RangeTest(Trial):
    """Sets the rate of each step, and stops once the loss is far above its lowest."""

    def __init__(self, lrs: list[float]) -> None:
        self._lrs = lrs
        self.losses: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rate, whatever the schedule says; the rates of several parameter groups keep their ratios."""
        groups = trainer.optimizers[0].param_groups
        lr = self._lrs[min(trainer.global_step, len(self._lrs) - 1)]
        for group in groups:
            group["lr"] = lr * group["initial_lr"] / groups[0]["initial_lr"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss; it is over all devices, so that they stop together."""
        loss = trainer.callback_metrics["train/loss"].item()
        finite = math.isfinite(loss) and not trainer.callback_metrics["train/skipped_steps"]
        if finite and trainer.global_step > 1:
            self.losses.append(loss)
        smoothed = smooth(self.losses)
        if not finite or (smoothed and smoothed[-1] > _DIVERGED * min(smoothed)):
            trainer.should_stop = True


def find_lr(
    module: SFTModule,
    datamodule: SFTDataModule,
    min_lr: float = 1e-7,
    max_lr: float = 1e-1,
    num_steps: int = 100,
    **trainer_options: Any,
) -> LearningRates:
    """Train for some steps while the learning rate rises exponentially, and record the loss.

    The steps are those that a run with these settings begins with, except for their rate. They end early once the
    smoothed loss is twice its lowest value, or is not finite. Afterwards module and data are as before, except that the
    model is loaded: a later run gives the same result as without this search.

    Args:
        module: The model, with the optimizer of the run.
        datamodule: The data.
        min_lr: Rate of the first step.
        max_lr: Rate of the last step.
        num_steps: Number of optimizer steps.
        **trainer_options: Arguments of the run's trainer, such as `precision`, `devices` and `strategy`. Its callbacks
            and loggers are not used.

    Returns:
        Rates, losses and a `suggestion`. A lower rate may be better for a long run, or to keep the model from
        forgetting what it knows.

    Raises:
        SettingsTypeError: If an argument is not a number.
        SettingsError: If an argument is out of range, or the strategy starts its own processes, whose results are lost.
    """
    check_type("min_lr", min_lr, Real, "a learning rate")
    check_type("max_lr", max_lr, Real, "a learning rate")
    check_integer("num_steps", num_steps, at_least=2)
    if not 0 < min_lr < max_lr < math.inf:
        raise SettingsError(
            f"`min_lr` is {min_lr} and `max_lr` {max_lr}, expected positive numbers, the second larger."
        )
    lrs = [min_lr * (max_lr / min_lr) ** (step / (num_steps - 1)) for step in range(num_steps)]
    test = _RangeTest(lrs)
    run_trial(test, module, num_steps + 1, trainer_options, datamodule=datamodule)
    return LearningRates(lrs[: len(test.losses)], test.losses)
