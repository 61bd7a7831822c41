"""Optimizer and schedule of a run that continues: what has been changed takes effect, or is refused by name.

An optimizer that is restored as it was saved has the learning rate, weight decay and other settings of the earlier run,
whatever is given now; and a restored schedule goes on with the learning rate that ended the shorter run.

A run continues from a checkpoint, or where an earlier `fit` of the same trainer has left it. Lightning then goes on
with the trainer's counters, but makes optimizer and schedule anew: the schedule would begin with its warmup again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import SettingsError, counted
from lightning_sft.model.sharding import is_sharded
from lightning_sft.training.optimizer_trial import IMPLEMENTATION, check_takes_shards, kind_of, missing_state
from lightning_sft.training.parameter_groups import Places, check_same_parameters, number_as_in_module
from lightning_sft.training.run_facts import run_facts

_KEY = "optimizer_settings"  # in a checkpoint
_PLAIN = (bool, int, float, str, tuple)
_PROPORTIONAL = (
    *(lr_scheduler.StepLR, lr_scheduler.MultiStepLR, lr_scheduler.ExponentialLR, lr_scheduler.ConstantLR),
    *(lr_scheduler.LinearLR, lr_scheduler.PolynomialLR, lr_scheduler.ReduceLROnPlateau),
)


@dataclass(frozen=True)
class OptimizerSettings:
    """What an optimizer was made with.

    Attributes:
        kind: Module and name of its class.
        groups: The settings of each parameter group, plain values alone; `lr` as it was before any schedule.
    """

    kind: str
    groups: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> "OptimizerSettings":
        """Those of an optimizer that has not been restored from a checkpoint yet."""
        return cls(kind_of(optimizer), tuple(_settings(group) for group in optimizer.param_groups))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: _plain(value) for name, value in group.items() if name not in ("params", "initial_lr")}
    settings |= {"lr": _plain(group["initial_lr"])} if "initial_lr" in group else {}
    return {name: value for name, value in settings.items() if value is None or isinstance(value, _PLAIN)}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def check_optimizer(then: OptimizerSettings, now: OptimizerSettings) -> None:
    """Refuse to continue with an optimizer of another class, or with another number of parameter groups."""
    if then.kind != now.kind:
        raise SettingsError(
            f"The checkpoint is of a run with the optimizer {then.kind}, but `optimizer` is {now.kind} here. Set "
            "`optimizer` to the one of that run, or begin a new run with its weights (`--init_from`)."
        )
    if len(then.groups) != len(now.groups):
        raise SettingsError(
            f"The checkpoint is of a run with {counted(len(then.groups), 'parameter group')}, but the optimizer has "
            f"{len(now.groups)} here. Make them as in that run, or begin a new run with its weights (`--init_from`)."
        )


def apply_settings(optimizer: Optimizer, then: OptimizerSettings, now: OptimizerSettings) -> dict[str, tuple[Any, Any]]:
    """Let settings that were changed take effect on an optimizer that was restored from a checkpoint.

    The checkpoint's optimizer was made with `then`, this one with `now`. Returned are the two values of each changed
    setting. The learning rate of an optimizer with a schedule is left to `continue_schedule`.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for group, before, today in zip(optimizer.param_groups, then.groups, now.groups, strict=True):
        new = {name: value for name, value in today.items() if name not in before or before[name] != value}
        changed |= {name: (before.get(name), value) for name, value in new.items()}
        if "lr" in new and "initial_lr" in group:
            group["initial_lr"] = new.pop("lr")
        for name, value in new.items():
            group[name] = torch.full_like(group[name], value) if isinstance(group[name], Tensor) else value
    if changed and (error := missing_state(optimizer)) is not None:
        names = ", ".join(f"`{name}` = {value}" for name, (_, value) in changed.items())
        raise SettingsError(
            f"The run cannot continue with {names}: its checkpoint lacks what the optimizer needs for that ({error}). "
            "Use what it was made with, or begin a new run with its weights (`--init_from`)."
        )
    if any(name in changed for name in IMPLEMENTATION):
        optimizer.load_state_dict(optimizer.state_dict())  # puts step counters where the implementation wants them
    return changed


def continue_schedule(scheduler: LRScheduler, then: OptimizerSettings | None, now: OptimizerSettings) -> None:
    """Go on at the learning rate that the schedule, as it is given now, has at this step.

    It was restored from a checkpoint whose optimizer was made with `then` (None: it does not say), this one with `now`.
    """
    rates = [group["lr"] for group in now.groups]
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs[: len(rates)] = rates
        factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
        _set_rates(scheduler, [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)])
        return
    before = rates if then is None else [group["lr"] for group in then.groups]
    changed = [(earlier, today) for earlier, today in zip(before, rates, strict=True) if earlier != today]
    if changed and (type(scheduler) not in _PROPORTIONAL or not all(before)):
        earlier, today = changed[0]
        raise SettingsError(
            f"The checkpoint was made with `lr` = {earlier}, now it is {today}, but {type(scheduler).__name__} "
            f"computes each learning rate from the one before. Use {earlier}, or begin a new run with its weights "
            "(`--init_from`)."
        )
    if changed:
        _scale(scheduler, [today / earlier for earlier, today in zip(before, rates, strict=True)])


def _scale(scheduler: LRScheduler, factors: Sequence[float]) -> None:
    """Multiply the first and the present learning rates of a schedule, from which it computes the next ones."""
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [float(rate) * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    groups = scheduler.optimizer.param_groups
    _set_rates(scheduler, [float(group["lr"]) * factor for group, factor in zip(groups, factors, strict=True)])


def _set_rates(scheduler: LRScheduler, rates: list[Any]) -> None:
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=False):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


@dataclass(frozen=True)
class _Left:
    """Optimizer and schedules that an earlier `fit` has left."""

    settings: OptimizerSettings
    optimizer: Optimizer
    schedules: Sequence[LRSchedulerConfig]

    def give_to(self, optimizer: Optimizer, schedules: Sequence[LRSchedulerConfig]) -> bool:
        """Restore them, if these are of the same classes and train the same parameters; return whether it is so."""
        if _kinds(self.optimizer, self.schedules) != _kinds(optimizer, schedules):
            return False
        optimizer.load_state_dict(self.optimizer.state_dict())
        for config, earlier in zip(schedules, self.schedules, strict=True):
            config.scheduler.load_state_dict(earlier.scheduler.state_dict())
        return True


def _kinds(optimizer: Optimizer, schedules: Sequence[LRSchedulerConfig]) -> list[Any]:
    """What has to be the same: the classes, and the very parameters of each group."""
    parameters = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    return [type(optimizer), parameters, *(type(config.scheduler) for config in schedules)]


def _go_on(trainer: L.Trainer) -> None:
    """Continue where an earlier `fit` of the trainer has left its data, also in the same rows of another datamodule.

    Another module would be trained from there on alone, and is refused.
    """
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    earlier_module, earlier = vars(trainer).get("_of_fit", (module, data))
    if module is not earlier_module and not trainer.strategy.restore_checkpoint_after_setup:  # one may follow
        raise SettingsError(
            f"The trainer has taken {counted(trainer.global_step, 'optimizer step')} already, with another module, and "
            "would not begin with the first one again. Fit with a new trainer."
        )
    if data is not earlier and isinstance(data, SFTDataModule) and isinstance(earlier, SFTDataModule):
        try:
            data.load_state_dict(earlier.state_dict())
        except SettingsError as error:
            then = str(error).partition(":")[0].replace("The checkpoint", "that run")
            raise SettingsError(
                f"The trainer has taken {counted(trainer.global_step, 'optimizer step')} already, and would go on at "
                f"this place in other data: {then}. Fit with a new trainer, which begins at the first step."
            ) from None


def _check_same_step(step: int | None) -> None:
    """Refuse machines that have found different checkpoints: their processes would wait for one another forever."""
    if not dist.is_initialized():
        return
    steps: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    for rank, other in enumerate(steps):
        if other != steps[0]:
            first, second = (f"step {each}" if each is not None else "no checkpoint" for each in (steps[0], other))
            raise SettingsError(
                f"Process 0 continues from {first}, but process {rank} from {second}. All machines have to find the "
                "same `ckpt_path`: keep runs in a folder that they share, or copy the checkpoint to the same path on "
                "each."
            )


class Continuation:
    """Compares a run with the one that it continues, and applies to its optimizer and schedule what has changed."""

    def __init__(self) -> None:
        self._continues = False
        self._step: int | None = None  # of the checkpoint
        self._settings: Mapping[str, Any] = {}  # of the checkpoint, by name
        self._left: _Left | None = None
        self._then: OptimizerSettings | None = None
        self._trained: Places = ()  # of the checkpoint
        self._now: OptimizerSettings | None = None

    def next_run(self, trainer: L.Trainer) -> "Continuation":
        """That of a run after this one: it continues nothing yet, unless the trainer still has this one's optimizer."""
        run, optimizers = Continuation(), trainer.strategy.optimizers
        if trainer.global_step > 0 and self._now is not None and optimizers:
            run._left = _Left(self._now, optimizers[0], trainer.strategy.lr_scheduler_configs)
        return run

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """The run continues from this checkpoint, whose optimizer is not restored yet."""
        self._continues, self._step = True, checkpoint.get("global_step")
        self._settings = checkpoint.get("model_card", {}).get("settings", {})
        if (values := checkpoint.get(_KEY)) is not None:
            self._then = OptimizerSettings(**values)
        states = checkpoint.get("optimizer_states", [{}])  # those of a sharded model are elsewhere
        if not states:
            raise SettingsError(
                "The checkpoint was saved where nothing was trained, such as after `trainer.validate`: it has no state "
                "of an optimizer. Use one of a training run, or begin a new run with its weights (`--init_from`)."
            )
        if "state" in states[0]:  # else `number_as_in_module` has left it alone
            self._trained = [group["params"] for group in states[0]["param_groups"]]

    def save(self, checkpoint: dict[str, Any], module: L.LightningModule) -> None:
        """Store what a run that continues from this checkpoint is compared with; see also `number_as_in_module`."""
        if self._now is not None:
            checkpoint[_KEY] = asdict(self._now)
        if not is_sharded(module):
            states = checkpoint.get("optimizer_states", [])
            for state, optimizer in zip(states, module.trainer.optimizers, strict=False):
                number_as_in_module(state, optimizer, module)

    def check(self, optimizers: Sequence[Optimizer], module: L.LightningModule) -> None:
        """Note what the optimizer is made with, before it is restored; refuse one that the run cannot go on with."""
        if len(optimizers) != 1:
            raise SettingsError(
                f"`configure_optimizers` returns {len(optimizers)} optimizers, but only one is supported. Return one "
                "with several parameter groups, each of which may have a learning rate of its own."
            )
        if isinstance(optimizers[0], _MockOptimizer):
            raise SettingsError("`configure_optimizers` returns no optimizer, so nothing would be trained. Return one.")
        trainer = module.trainer
        if trainer.global_step > 0 and not self._continues:
            _go_on(trainer)
        trainer._of_fit = module, getattr(trainer, "datamodule", None)  # type: ignore[attr-defined]
        self._now = OptimizerSettings.of(optimizers[0])
        if self._then is not None:
            check_optimizer(self._then, self._now)
            check_same_parameters(self._trained, optimizers[0], module)
        check_takes_shards(optimizers[0])
        _check_same_step(self._step)

    def apply(self, trainer: L.Trainer) -> None:
        """Apply changed settings to the restored optimizer and schedules, and say which they are."""
        left, self._left = self._left, None
        optimizer, schedules = trainer.optimizers[0], trainer.lr_scheduler_configs
        assert self._now is not None  # `check` comes first
        if not self._continues and left is not None:
            self._continues, self._then = left.give_to(optimizer, schedules), left.settings
            if not self._continues:
                rank_zero_info(
                    "The trainer continues after an earlier `fit`, but with another optimizer, other parameters or "
                    "another schedule: optimizer and schedule begin anew."
                )
        if not self._continues:
            return
        changed = {} if self._then is None else apply_settings(optimizer, self._then, self._now)
        for config in schedules:
            continue_schedule(config.scheduler, self._then, self._now)
        for name, value in run_facts(trainer).settings.items():
            if _plain(before := self._settings.get(name, value)) != _plain(value):
                changed[name] = (before, value)
        if changed:
            words = ", ".join(f"`{name}` {now} (before: {before})" for name, (before, now) in changed.items())
            rank_zero_info(f"The run continues with changed settings: {words}.")
