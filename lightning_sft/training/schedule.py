"""The learning rate over a run's optimizer steps: `Schedule`, and schedules of Lightning's own forms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.pytorch.core.optimizer import _configure_optimizers
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_sft.checks import check_number, check_type
from lightning_sft.errors import SettingsError, one_line

_WITHOUT_LENGTH = ("constant", "constant_with_warmup")
_OF_A_METRIC = ("reduce_lr_on_plateau", "greedy")
# The learning rate, as a fraction of its peak, at each fraction of the steps after the warmup.
_AFTER_WARMUP: dict[str, Callable[[float], float]] = {
    "constant_with_warmup": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


@dataclass(frozen=True)
class Schedule:
    """A schedule of `transformers`.

    Attributes:
        name: That `transformers` gives it, such as `cosine`.
        warmup_steps: Optimizer steps over which the learning rate rises; below 1: a fraction of the run.
        kwargs: Further arguments of the schedule.
    """

    name: str = "cosine"
    warmup_steps: float = 0.03
    kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_number(
            "warmup_steps",
            self.warmup_steps,
            "a number of steps or a fraction below 1",
            lambda steps: steps >= 0 and (steps <= 1 or steps % 1 == 0),
        )
        check_type("lr_scheduler_kwargs", self.kwargs, dict, "a mapping of arguments", optional=True)
        if self.name in _OF_A_METRIC:
            raise SettingsError(
                f"`lr_scheduler` is {self.name!r}, which follows a metric, not the optimizer steps. Choose another, "
                "such as cosine."
            )
        if self.name not in (*_AFTER_WARMUP, *_WITHOUT_LENGTH):
            self._check_name()
        if self.name == "constant":
            self._check_constant()
        # Wrong ones are refused now rather than after data and model are loaded. A checkpoint does not hold them.
        if self.kwargs:
            self.build(SGD([torch.zeros(())], lr=1.0), num_steps=100)

    def _check_constant(self) -> None:
        """Refuse what `transformers` would ignore."""
        if self.warmup_steps not in (0, Schedule.warmup_steps):
            raise SettingsError(
                f"`lr_scheduler` is 'constant', which has no warmup, but `warmup_steps` is {self.warmup_steps}. Set "
                "`lr_scheduler` to 'constant_with_warmup', or `warmup_steps` to 0."
            )
        if self.kwargs:
            raise SettingsError(
                f"`lr_scheduler` is 'constant', which has no arguments, but `lr_scheduler_kwargs` is {self.kwargs}. "
                "Leave them out, or choose another schedule."
            )

    def _check_name(self) -> None:
        from transformers.trainer_utils import SchedulerType  # takes as long as what `build` imports for such a name

        names = {kind.value for kind in SchedulerType} - set(_OF_A_METRIC)
        if self.name not in names:
            raise SettingsError(f"`lr_scheduler` is {self.name!r}, expected one of {', '.join(sorted(names))}.")

    def build(self, optimizer: Optimizer, num_steps: int) -> LRScheduler:
        """The scheduler of an optimizer over a run of `num_steps` optimizer steps; -1: the run has no length."""
        needs_length = self.name not in _WITHOUT_LENGTH or (self.name != "constant" and 0 < self.warmup_steps < 1)
        if num_steps < 0 and needs_length:
            raise SettingsError(
                f"`lr_scheduler` is {self.name!r} with `warmup_steps` = {self.warmup_steps}, but the run has no "
                "length. Set `max_steps` or `max_epochs`, or choose `constant` or `constant_with_warmup` with a "
                "number of steps."
            )
        is_fraction = self.warmup_steps < 1
        num_warmup_steps = math.ceil(self.warmup_steps * num_steps) if is_fraction else int(self.warmup_steps)
        if self.name in _AFTER_WARMUP and not self.kwargs:
            factor = partial(_fraction_of_peak, name=self.name, num_warmup_steps=num_warmup_steps, num_steps=num_steps)
            return LambdaLR(optimizer, factor)
        # A second or two: it brings `peft`, and what that finds, such as bitsandbytes and torch's compiler.
        from transformers import get_scheduler

        try:
            # After a run that ends with its warmup, or before, `polynomial` would divide by the 0 steps that follow.
            num_steps = max(num_steps, num_warmup_steps + 1)
            scheduler: LRScheduler = get_scheduler(self.name, optimizer, num_warmup_steps, num_steps, self.kwargs)
        except (ValueError, TypeError) as error:
            with_kwargs = f" with `lr_scheduler_kwargs` = {self.kwargs}" if self.kwargs else ""
            raise SettingsError(f"`lr_scheduler` is {self.name!r}{with_kwargs}: {one_line(error)}") from None
        return scheduler


def _fraction_of_peak(step: int, *, name: str, num_warmup_steps: int, num_steps: int) -> float:
    """What `transformers` computes for its most common schedules."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return max(0.0, _AFTER_WARMUP[name](progress))


def run_length(trainer: L.Trainer) -> int:
    """Optimizer steps of a run; -1 if it has no length.

    `SFTDataModule` counts them. Of a run over another loader Lightning estimates them.
    """
    if hasattr(getattr(trainer, "datamodule", None), "run_state"):
        return trainer.max_steps
    num_steps = trainer.estimated_stepping_batches
    return int(num_steps) if math.isfinite(num_steps) else -1


def steps_per_epoch(trainer: L.Trainer) -> int | None:
    """Optimizer steps that a run takes of the data in each epoch; None if nobody knows."""
    known: int | None = getattr(getattr(trainer, "datamodule", None), "run_state", {}).get("steps_per_epoch")
    return known


_LEFT_AT: WeakKeyDictionary[LRScheduler, int | None] = WeakKeyDictionary()  # which `last_epoch` each had after our step


def step_schedules(trainer: L.Trainer) -> None:
    """After an optimizer step, step those schedules that follow steps or epochs and are due, if nobody else does."""
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        now = getattr(config.scheduler, "last_epoch", None)
        if _LEFT_AT.get(config.scheduler, now) != now:
            raise SettingsError(
                f"{type(config.scheduler).__name__} was stepped by your own code, but schedules are stepped after each "
                "optimizer step already, as `configure_optimizers` says. Leave that out (`lr_schedulers().step()`)."
            )
        every = config.frequency
        if config.interval == "epoch":
            if (in_epoch := steps_per_epoch(trainer)) is None:
                raise SettingsError(
                    f"`configure_optimizers` returns {type(config.scheduler).__name__} with the interval 'epoch', but "
                    "the length of an epoch of this data is not known. Set its `interval` to 'step'."
                )
            every *= in_epoch
        if trainer.global_step % every == 0:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, None)
        _LEFT_AT[config.scheduler] = getattr(config.scheduler, "last_epoch", None)


def step_plateau_schedules(module: L.LightningModule) -> None:
    """After a training run's validation, before it is saved, step schedules that follow a metric (`ReduceLROnPlateau`).

    The module's `configure_optimizers` says which (`monitor`); `val/loss` unless it does.
    """
    configs = module.trainer.lr_scheduler_configs
    plateaus = [index for index, each in enumerate(configs) if isinstance(each.scheduler, ReduceLROnPlateau)]
    if not plateaus or module.trainer.sanity_checking or module.trainer.state.fn != "fit":
        return
    # Asked again: under manual optimization Lightning drops the metrics that are named there.
    configured: Any = module.configure_optimizers()
    _, schedules, of_all = _configure_optimizers(configured)
    for index in plateaus:
        own = schedules[index].get("monitor") if isinstance(schedules[index], dict) else None
        monitor = own or of_all or "val/loss"
        if monitor not in (metrics := module.trainer.callback_metrics):
            raise SettingsError(
                f"`configure_optimizers` says that ReduceLROnPlateau follows {monitor!r}, but the metrics are "
                f"{', '.join(sorted(metrics))}."
            )
        module.lr_scheduler_step(configs[index].scheduler, metrics[monitor])
