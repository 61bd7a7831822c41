"""A run's length, told to the trainer as one long epoch."""

from typing import Any

import lightning as L

from lightning_sft.errors import SettingsError


def show_one_long_epoch(trainer: L.Trainer, steps_per_epoch: int, has_validation: bool) -> dict[str, Any]:
    """Turn the trainer's epochs into optimizer steps.

    Lightning's own epoch counters go wrong when a run is resumed more than once, and with them order and length.

    Args:
        trainer: Before it starts.
        steps_per_epoch: Optimizer steps.
        has_validation: Whether there are validation rows.

    Returns:
        The settings as they were found, for `restore_settings`.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    settings = {
        "max_epochs": fit_loop.max_epochs,
        "min_epochs": fit_loop.min_epochs,
        "max_steps": epoch_loop.max_steps,
        "min_steps": epoch_loop.min_steps,
        "limit_train_batches": trainer.limit_train_batches,
        "limit_val_batches": trainer.limit_val_batches,
        "val_check_interval": trainer.val_check_interval,
        "check_val_every_n_epoch": trainer.check_val_every_n_epoch,
    }
    limits = [epoch_loop.max_steps] if epoch_loop.max_steps >= 0 else []
    if fit_loop.max_epochs is not None and fit_loop.max_epochs >= 0:
        limits.append(fit_loop.max_epochs * steps_per_epoch)
    num_steps = min(limits, default=-1)

    interval = trainer.val_check_interval
    if isinstance(interval, float):  # a fraction of an epoch; a run shorter than that is validated at its end
        num_epochs = (trainer.check_val_every_n_epoch or 1) if interval == 1.0 else 1
        interval = max(1, int(interval * num_epochs * steps_per_epoch))
        interval = min(interval, num_steps) if num_steps > 0 else interval
    if fit_loop.min_epochs:
        epoch_loop.min_steps = max(epoch_loop.min_steps or 0, fit_loop.min_epochs * steps_per_epoch)
    fit_loop.max_epochs, fit_loop.min_epochs, epoch_loop.max_steps = -1, None, num_steps
    trainer.limit_train_batches = 1.0
    trainer.val_check_interval = interval
    if has_validation:
        trainer.check_val_every_n_epoch = None  # the interval counts over the whole run
    else:
        trainer.limit_val_batches = 0
    return settings


def streamed_steps(trainer: L.Trainer) -> int:
    """The number of optimizer steps, where the data cannot tell how many make an epoch.

    Raises:
        ValueError: If the trainer does not say it, or is to take a share of the data.
    """
    if trainer.max_steps < 0:
        raise SettingsError(
            f"`trainer.max_steps` is {trainer.max_steps}, but `streaming` needs the number of optimizer steps: nobody "
            "knows how long the data is."
        )
    if isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches != 1.0:
        raise SettingsError(
            f"`trainer.limit_train_batches` is {trainer.limit_train_batches}, but with `streaming` nobody knows how "
            "long the data is. Give a whole number: the optimizer steps after which it starts over."
        )
    return trainer.max_steps


def restore_settings(trainer: L.Trainer, settings: dict[str, Any]) -> None:
    """Leave the trainer's settings as they were found."""
    for name in ("max_epochs", "min_epochs"):
        setattr(trainer.fit_loop, name, settings[name])
    for name in ("max_steps", "min_steps"):
        setattr(trainer.fit_loop.epoch_loop, name, settings[name])
    for name in ("limit_train_batches", "limit_val_batches", "val_check_interval", "check_val_every_n_epoch"):
        setattr(trainer, name, settings[name])


def leave_inference_mode(trainer: L.Trainer) -> None:
    """Evaluate without gradients, but not in inference mode: FSDP2 could not train with what it gathers first there.

    Args:
        trainer: Before it starts.
    """
    validation = trainer.fit_loop.epoch_loop.val_loop
    for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
