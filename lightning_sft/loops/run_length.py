"""How long a run is, and when it is validated: a trainer's settings, turned into optimizer steps."""

from dataclasses import dataclass, fields, replace

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.errors import SettingsError

INSTEAD_OF_ACCUMULATION = (
    "`gradient_accumulation_steps` or `max_tokens_per_microbatch` of `SFTDataModule`, which split an optimizer step "
    "without changing its result"
)


@dataclass(frozen=True)
class Epoch:
    """What an epoch takes of the training rows.

    Attributes:
        num_steps: Optimizer steps.
        is_limited: Whether the trainer's `limit_train_batches` ends it, and not the data.
        shuffle: Whether each epoch has an order of its own. If not, it is the order of the data.
    """

    num_steps: int
    is_limited: bool = False
    shuffle: bool = True


@dataclass(frozen=True)
class LoopSettings:
    """The trainer's settings of a run's length, as Lightning names them."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    limit_train_batches: int | float
    limit_val_batches: int | float
    val_check_interval: int | float
    check_val_every_n_epoch: int | None

    @classmethod
    def of(cls, trainer: L.Trainer) -> "LoopSettings":
        """Those of a trainer."""
        return cls(**{setting.name: getattr(trainer, setting.name) for setting in fields(cls)})

    def apply(self, trainer: L.Trainer) -> None:
        """Give them to a trainer."""
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        fit_loop.max_epochs, fit_loop.min_epochs = self.max_epochs, self.min_epochs
        epoch_loop.max_steps, epoch_loop.min_steps = self.max_steps, self.min_steps
        trainer.limit_train_batches, trainer.limit_val_batches = self.limit_train_batches, self.limit_val_batches
        trainer.val_check_interval = self.val_check_interval
        trainer.check_val_every_n_epoch = self.check_val_every_n_epoch


def check_accumulation(trainer: L.Trainer) -> None:
    """Refuse accumulation by the trainer: each batch is a whole optimizer step already."""
    if trainer.accumulate_grad_batches != 1:
        raise SettingsError(
            f"`trainer.accumulate_grad_batches` is {trainer.accumulate_grad_batches}, but a batch is a whole optimizer "
            f"step. Use {INSTEAD_OF_ACCUMULATION}."
        )


def check_validation(trainer: L.Trainer) -> None:
    """Refuse an interval of validation that is a time, or that is given both in optimizer steps and in epochs."""
    if (seconds := getattr(trainer, "_val_check_time_interval", None)) is not None:
        raise SettingsError(
            f"`trainer.val_check_interval` is a time, {seconds:g} seconds, but validations are counted in optimizer "
            "steps: each device has a clock of its own, and a run that continues would validate at other steps. Give "
            "a number of steps, or a fraction of an epoch."
        )
    interval, num_epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    is_default = isinstance(interval, float) and interval == 1.0
    if not is_default and num_epochs not in (None, 1):
        raise SettingsError(
            f"`trainer.val_check_interval` is {interval} and `trainer.check_val_every_n_epoch` is {num_epochs}, but an "
            "interval counts optimizer steps over the whole run, whatever the epoch. Give one of them."
        )


def read_epoch(trainer: L.Trainer, steps_in_data: int | None) -> Epoch:
    """What a trainer takes in each epoch of data that `steps_in_data` optimizer steps go through; None: unknown."""
    limit = trainer.limit_train_batches
    if steps_in_data is None:
        _check_length(trainer)
        num_steps = limit if isinstance(limit, int) else trainer.max_steps
    else:
        num_steps = limited_steps(limit, steps_in_data)
    return Epoch(num_steps, isinstance(limit, int), shuffle=trainer.overfit_batches == 0)  # type: ignore[attr-defined]


def limited_steps(limit: int | float, num_steps: int) -> int:
    """What `limit_train_batches` leaves of an epoch's optimizer steps: an integer is their number, a float a share."""
    return min(limit, num_steps) if isinstance(limit, int) else max(1, int(limit * num_steps))


def _check_length(trainer: L.Trainer) -> None:
    """Refuse a trainer that does not say how long a run over streamed rows is."""
    if trainer.max_steps < 0:
        raise SettingsError(
            f"`trainer.max_steps` is {trainer.max_steps}, but `streaming` needs the number of optimizer steps: the "
            "length of the data is not known."
        )
    if isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches != 1.0:
        raise SettingsError(
            f"`trainer.limit_train_batches` is {trainer.limit_train_batches}, but with `streaming` the length of the "
            "data is not known. Give a whole number: the optimizer steps after which it starts over."
        )


def in_steps(found: LoopSettings, steps_per_epoch: int, has_validation: bool) -> LoopSettings:
    """The same run, with what ends and validates it turned from epochs into optimizer steps."""
    limits = [found.max_steps] if found.max_steps >= 0 else []
    if found.max_epochs is not None and found.max_epochs >= 0:
        limits.append(found.max_epochs * steps_per_epoch)
    num_steps = min(limits, default=-1)

    interval = found.val_check_interval
    if isinstance(interval, float):  # a fraction of an epoch; a run shorter than that is validated at its end
        num_epochs = (found.check_val_every_n_epoch or 1) if interval == 1.0 else 1
        interval = max(1, int(interval * num_epochs * steps_per_epoch))
        interval = min(interval, num_steps) if num_steps > 0 else interval
    elif has_validation and found.limit_val_batches and 0 < num_steps < interval:
        rank_zero_info(
            f"There is no validation: `trainer.val_check_interval` is {interval} optimizer steps, the run {num_steps}."
        )
    min_steps = found.min_steps
    if found.min_epochs:
        min_steps = max(min_steps or 0, found.min_epochs * steps_per_epoch)
    return replace(
        found,
        min_epochs=None,
        max_steps=num_steps,
        min_steps=min_steps,
        limit_train_batches=1.0,
        limit_val_batches=found.limit_val_batches if has_validation else 0,
        val_check_interval=interval,
        # The interval counts over the whole run, not from the beginning of an epoch.
        check_val_every_n_epoch=None if has_validation else found.check_val_every_n_epoch,
    )
