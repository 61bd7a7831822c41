"""The counters of Lightning's loops, set to where a run is.

Restored as Lightning does it, they are wrong once a run has continued more than once: an epoch is trained twice, or its
hooks are not called. Here all of them follow from the number of optimizer steps.
"""

from dataclasses import dataclass, field

import lightning as L
from lightning.pytorch.loops import _Loop


@dataclass(frozen=True)
class EpochPosition:
    """Where a run is in its epochs.

    Attributes:
        epoch: That of the latest optimizer step, from 0.
        num_steps: Steps taken in this epoch.
        is_whole: Whether these are all of its steps.
    """

    epoch: int = 0
    num_steps: int = 0
    is_whole: bool = False

    @classmethod
    def in_equal_epochs(cls, num_steps: int, steps_per_epoch: int) -> "EpochPosition":
        """That after a number of optimizer steps of a run whose epochs all have as many."""
        if num_steps == 0:
            return cls()
        epoch, before = divmod(num_steps - 1, steps_per_epoch)
        return cls(epoch, before + 1, is_whole=before + 1 == steps_per_epoch)


@dataclass(frozen=True)
class Due:
    """What is still to come after the latest optimizer step, before the next one.

    Attributes:
        validation: The validation that follows this step.
        epoch_end: The hooks at the end of its epoch, or of an epoch that the run's end cuts short.
        is_run_end: Whether no step follows.
    """

    validation: bool
    epoch_end: bool
    is_run_end: bool

    @classmethod
    def after_latest_step(cls, trainer: L.Trainer, position: EpochPosition) -> "Due":
        """Read it from the loops, as a checkpoint or an earlier `fit` has left them.

        That is all their counters are asked for: whether the latest step and its epoch were at their end.
        """
        loop, num_steps, interval = trainer.fit_loop, trainer.global_step, trainer.val_check_interval
        num_epochs_ended = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        num_steps_ended = loop.epoch_loop.batch_progress.total.completed
        validates_here = isinstance(interval, int) and num_steps % interval == 0 and trainer.enable_validation
        is_run_end = num_steps == loop.max_steps or (trainer.should_stop and loop._can_stop_early)
        ends_epoch = num_steps > 0 and (position.is_whole or is_run_end)
        return cls(
            validation=validates_here and num_steps_ended < num_steps,
            epoch_end=ends_epoch and num_epochs_ended <= position.epoch,
            is_run_end=is_run_end,
        )


_Count = dict[str, int]


def _count(begun: int, done: int | None = None, ended: int | None = None) -> _Count:
    """How often something was begun, done, and ended with the hooks at its end, by the names that Lightning has.

    By default all that was begun is done, and all that is done has ended.
    """
    done = begun if done is None else done
    return {"ready": begun, "started": begun, "processed": done, "completed": done if ended is None else ended}


@dataclass(frozen=True)
class _Progress:
    """The counters of all loops.

    Attributes:
        epochs: Of the run.
        steps: Of the run.
        steps_in_epoch: Of the present epoch.
        num_logged: Steps after which Lightning has logged.
        validation: Batches of the present validation.
        is_within_epoch: Whether the hooks at the epoch's beginning have been called.
        goes_on: Whether the epoch has a step or a validation to continue with.
        is_last_step: Whether the latest step is the epoch's last.
    """

    epochs: _Count
    steps: _Count
    steps_in_epoch: _Count
    num_logged: int
    validation: _Count = field(default_factory=lambda: _count(0))
    is_within_epoch: bool = True
    goes_on: bool = True
    is_last_step: bool = False

    @classmethod
    def at(cls, num_steps: int, position: EpochPosition, due: Due) -> "_Progress":
        """That from which Lightning does what is due after the latest step, and takes the next one."""
        in_epoch, steps, present = position.num_steps, _count(num_steps), _count(position.epoch + 1, position.epoch)
        if due.validation:  # in the middle of it, at its first batch
            middle = _count(1, 0)
            return cls(present, steps, _count(in_epoch), num_steps - 1, middle, is_last_step=position.is_whole)
        if due.epoch_end:  # in an epoch of which nothing is left
            return cls(present, steps, _count(0), num_steps, goes_on=False)
        if num_steps == 0 or position.is_whole or due.is_run_end:  # between two epochs
            num_epochs = position.epoch + 1 if num_steps else 0
            return cls(_count(num_epochs), steps, _count(0), num_steps, is_within_epoch=False, goes_on=False)
        latest = _count(in_epoch, ended=in_epoch - 1)  # at the end of a step
        return cls(present, _count(num_steps, ended=num_steps - 1), latest, num_steps - 1)


def set_progress(trainer: L.Trainer, position: EpochPosition, due: Due) -> None:
    """Set the counters of the training loops, and whether they continue, after `global_step` optimizer steps."""
    loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    progress = _Progress.at(trainer.global_step, position, due)
    loop.epoch_progress.load_state_dict({"total": progress.epochs, "current": progress.epochs})
    epoch_loop.batch_progress.load_state_dict(
        {"total": progress.steps, "current": progress.steps_in_epoch, "is_last_batch": progress.is_last_step}
    )
    epoch_loop.val_loop.batch_progress.load_state_dict(
        {"total": progress.validation, "current": _count(0), "is_last_batch": False}
    )
    epoch_loop._batches_that_stepped = progress.num_logged

    _Loop.restarting.fset(loop, progress.goes_on)  # type: ignore[attr-defined]  # of the loops within it, too
    loop._restarting = progress.is_within_epoch
    loop._loaded_from_state_dict = False
    loop._resuming_from_checkpoint = True  # the loader is not iterated over a second time


def finish(trainer: L.Trainer, due: Due) -> None:
    """Do what is due after the last optimizer step of a run, such as to export the model, which may have been killed.

    Lightning would not begin, as nothing is left to train.
    """
    loop = trainer.fit_loop
    loop.setup_data()
    loop.reset()
    loop.on_run_start()
    if due.epoch_end:
        loop.on_advance_start()
        loop.advance()
        loop.on_advance_end()
        loop.on_iteration_done()
    loop.on_run_end()
