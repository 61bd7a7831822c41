"""How Lightning's loops see a run: all that touches the trainer's own settings and counters.

To the trainer a run is one long epoch, and what counts in its settings counts optimizer steps. Lightning's own epoch
counters go wrong when a run is resumed more than once, and with them order and length.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning as L

from lightning_sft.errors import SettingsError

_ENDLESS = 2**31


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
    val_check_interval: Any
    check_val_every_n_epoch: int | None

    @classmethod
    def of(cls, trainer: L.Trainer) -> "LoopSettings":
        """Those of a trainer."""
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        return cls(
            max_epochs=fit_loop.max_epochs,
            min_epochs=fit_loop.min_epochs,
            max_steps=epoch_loop.max_steps,
            min_steps=epoch_loop.min_steps,
            limit_train_batches=trainer.limit_train_batches,
            limit_val_batches=trainer.limit_val_batches,
            val_check_interval=trainer.val_check_interval,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        )

    def apply(self, trainer: L.Trainer) -> None:
        """Give them to a trainer."""
        fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        fit_loop.max_epochs, fit_loop.min_epochs = self.max_epochs, self.min_epochs
        epoch_loop.max_steps, epoch_loop.min_steps = self.max_steps, self.min_steps
        trainer.limit_train_batches, trainer.limit_val_batches = self.limit_train_batches, self.limit_val_batches
        trainer.val_check_interval = self.val_check_interval
        trainer.check_val_every_n_epoch = self.check_val_every_n_epoch


class TrainingRun:
    """A run's optimizer steps, by their numbers; iterated over, those that are still to come.

    Args:
        trainer: Before it starts. Its settings are changed until `end`.
        steps_in_data: Optimizer steps that go once through the data; None if nobody knows.
        has_validation: Whether there are validation rows.

    Attributes:
        epoch: What it takes of the data.

    Raises:
        SettingsError: If nobody knows how long the data is, and the trainer does not say how long the run is, or is to
            take a share of the data.
    """

    def __init__(self, trainer: L.Trainer, steps_in_data: int | None, has_validation: bool) -> None:
        self._trainer, self._steps_in_data = trainer, steps_in_data
        self.epoch = _read_epoch(trainer, steps_in_data)
        self._found = LoopSettings.of(trainer)
        _as_one_epoch(self._found, self.epoch.num_steps, has_validation).apply(trainer)

    def end(self) -> None:
        """Leave the trainer's settings as they were found."""
        self._found.apply(self._trainer)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in plain values: which step of which epoch the next one is."""
        known = self._steps_in_data is not None or self.epoch.is_limited
        return {"steps_per_epoch": self.epoch.num_steps if known else None, "shuffle": self.epoch.shuffle}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Refuse to continue a run whose epochs had other steps.

        Args:
            saved: The `state` of its checkpoint; empty if it does not say.

        Raises:
            SettingsError: If they had.
        """
        now = self.state()
        if saved and saved["shuffle"] != now["shuffle"]:
            raise SettingsError(
                "The checkpoint was made with another `trainer.overfit_batches`: the run cannot continue at the same "
                "place in the data. Use that, or begin a new run with its weights (`--init_from`)."
            )
        if saved and saved["steps_per_epoch"] != now["steps_per_epoch"]:
            then, today = (state["steps_per_epoch"] or "all" for state in (saved, now))
            raise SettingsError(
                f"The checkpoint was made with {then} optimizer steps in each epoch, now it is {today} "
                "(`trainer.limit_train_batches`): the run cannot continue at the same place in the data. Use that, or "
                "begin a new run with its weights (`--init_from`)."
            )

    def __len__(self) -> int:
        # One more than are taken: the run ends by its number of steps, so a finished run can be extended.
        return self._trainer.max_steps + 1 if self._trainer.max_steps >= 0 else _ENDLESS

    def __iter__(self) -> Iterator[int]:
        # Resumed or not, a run has taken as many of the data's steps as it has taken optimizer steps.
        return iter(range(self._trainer.global_step, len(self)))


def _read_epoch(trainer: L.Trainer, steps_in_data: int | None) -> Epoch:
    if steps_in_data is None:
        _check_length(trainer)
    limit = trainer.limit_train_batches
    is_limited, num_steps = isinstance(limit, int), trainer.max_steps if steps_in_data is None else steps_in_data
    if not isinstance(limit, int):
        num_steps = max(1, int(limit * num_steps))
    elif steps_in_data is None:
        num_steps = limit
    else:
        num_steps = min(limit, num_steps)
    return Epoch(num_steps, is_limited, shuffle=trainer.overfit_batches == 0)  # type: ignore[attr-defined]


def _check_length(trainer: L.Trainer) -> None:
    """Refuse a trainer that does not say how long a run over streamed rows is."""
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


def _as_one_epoch(found: LoopSettings, steps_per_epoch: int, has_validation: bool) -> LoopSettings:
    """The same run, with its epochs turned into optimizer steps."""
    limits = [found.max_steps] if found.max_steps >= 0 else []
    if found.max_epochs is not None and found.max_epochs >= 0:
        limits.append(found.max_epochs * steps_per_epoch)
    num_steps = min(limits, default=-1)

    interval = found.val_check_interval
    if isinstance(interval, float):  # a fraction of an epoch; a run shorter than that is validated at its end
        num_epochs = (found.check_val_every_n_epoch or 1) if interval == 1.0 else 1
        interval = max(1, int(interval * num_epochs * steps_per_epoch))
        interval = min(interval, num_steps) if num_steps > 0 else interval
    min_steps = found.min_steps
    if found.min_epochs:
        min_steps = max(min_steps or 0, found.min_epochs * steps_per_epoch)
    return replace(
        found,
        max_epochs=-1,
        min_epochs=None,
        max_steps=num_steps,
        min_steps=min_steps,
        limit_train_batches=1.0,
        limit_val_batches=found.limit_val_batches if has_validation else 0,
        val_check_interval=interval,
        # The interval counts over the whole run, not from the beginning of an epoch.
        check_val_every_n_epoch=None if has_validation else found.check_val_every_n_epoch,
    )


def leave_inference_mode(trainer: L.Trainer) -> None:
    """Evaluate without gradients, but not in inference mode: FSDP2 could not train with what it gathers first there.

    Args:
        trainer: Before it starts.
    """
    validation = trainer.fit_loop.epoch_loop.val_loop
    for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
