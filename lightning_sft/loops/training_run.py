"""A training run as numbered optimizer steps, which the trainer is given epoch by epoch.

The trainer's epochs are those of the data, but when a run ends and when it validates is counted in optimizer steps.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.errors import SettingsError
from lightning_sft.loops.progress import Due, EpochPosition, finish, set_progress
from lightning_sft.loops.run_length import LoopSettings, check_accumulation, check_validation, in_steps, read_epoch
from lightning_sft.loops.trainer_state import has_stopped_early

_ENDLESS = 2**31


class EpochData(Protocol):
    """What a run goes through in each of its epochs."""

    def count_steps(self) -> int | None:
        """Optimizer steps that go once through it; None if nobody knows."""

    def position(self, num_steps: int) -> EpochPosition:
        """Where a run is after so many optimizer steps, if it goes through all of it in each epoch."""


class TrainingRun:
    """A run's optimizer steps, by their numbers; iterated over, those that are still to come.

    Args:
        trainer: Before it starts. Its settings are changed until `end`.
        data: The training rows.
        has_validation: Whether there are validation rows.

    Attributes:
        trainer: It has taken `global_step` of the run's steps, in parts of the run that it continues, too.
        epoch: What it takes of the data.
        steps_per_epoch: None if nobody knows.
    """

    def __init__(self, trainer: L.Trainer, data: EpochData, has_validation: bool) -> None:
        check_accumulation(trainer)
        check_validation(trainer)
        self.trainer, self._data = trainer, data
        steps_in_data = data.count_steps()
        self.epoch = read_epoch(trainer, steps_in_data)
        is_known = steps_in_data is not None or self.epoch.is_limited
        self.steps_per_epoch = self.epoch.num_steps if is_known else None
        self._found = LoopSettings.of(trainer)
        in_steps(self._found, self.epoch.num_steps, has_validation).apply(trainer)
        self._metrics: Mapping[str, float] = {}
        self._loader: EpochLoader | None = None
        trainer.fit_loop.run = self._run_loops  # type: ignore[method-assign]

    def end(self) -> None:
        """Leave the trainer's settings as they were found, and end what makes steps ahead."""
        self._found.apply(self.trainer)
        vars(self.trainer.fit_loop).pop("run", None)
        if self._loader is not None:
            self._loader.close()
        self._loader = None

    def by_epochs(self, steps: Iterable[Any]) -> "EpochLoader":
        """Hand out the run's steps, epoch by epoch. Iterated over, `steps` always begin with the present one."""
        self._loader = EpochLoader(steps, self)
        return self._loader

    # -- where it is ---------------------------------------------------------------------------------------------

    def position(self, num_steps: int) -> EpochPosition:
        """Where in its epochs the run is after so many optimizer steps."""
        if self.steps_per_epoch is None:
            return self._data.position(num_steps)
        return EpochPosition.in_equal_epochs(num_steps, self.steps_per_epoch)

    def _run_loops(self) -> None:
        """Do what is due, and train from the present step on: what the trainer calls to run its loops."""
        trainer = self.trainer
        trainer.fit_loop._combined_loader = None  # it may have been asked for before a checkpoint was restored
        if has_stopped_early(trainer):
            trainer.should_stop = True
            rank_zero_info(
                "`EarlyStopping` has ended this run, by its state and `patience`, which are kept in checkpoints: no "
                "more is trained than `min_steps` asks for. To train on, leave the callback out."
            )
        position = self.position(trainer.global_step)
        due = Due.after_latest_step(trainer, position)
        set_progress(trainer, position, due)
        # What is due after the latest step may look at what was logged up to it.
        metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._metrics.items()}
        trainer._logger_connector._callback_metrics.update(metrics)
        if due.is_run_end and trainer.global_step > 0:
            finish(trainer, due)
        else:
            type(trainer.fit_loop).run(trainer.fit_loop)

    def __len__(self) -> int:
        return len(self._to_come())

    def __iter__(self) -> Iterator[int]:
        return iter(self._to_come())

    def _to_come(self) -> range:
        max_steps = self.trainer.max_steps
        return range(self.trainer.global_step, max_steps if max_steps >= 0 else _ENDLESS)

    # -- what a checkpoint keeps of it -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, in plain values: which step of which epoch the next one is."""
        return {"steps_per_epoch": self.steps_per_epoch, "shuffle": self.epoch.shuffle}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Continue the run of which a checkpoint has kept the `state` and the `metrics`; refuse if epochs differ."""
        self._metrics = saved.get("metrics", {})
        now = self.state()
        if not saved:
            return
        if saved["shuffle"] != now["shuffle"]:
            difference = "another `trainer.overfit_batches`"
        elif saved["steps_per_epoch"] != now["steps_per_epoch"]:
            then, today = (state["steps_per_epoch"] or "all" for state in (saved, now))
            difference = f"{then} optimizer steps in each epoch, now it is {today} (`trainer.limit_train_batches`)"
        else:
            return
        raise SettingsError(
            f"The checkpoint was made with {difference}: the run cannot continue at the same place in the data. Use "
            "that, or begin a new run with its weights (`--init_from`)."
        )


class EpochLoader:
    """Iterates over those steps of the run's present epoch that are still to come.

    What makes them goes on beyond an epoch's end, so that its workers are neither started anew nor idle there. Iterated
    over, `steps` always begin with the present step of the run.
    """

    def __init__(self, steps: Iterable[Any], run: TrainingRun) -> None:
        self._steps, self._run = steps, run
        self._iterator: Iterator[Any] | None = None
        self._held: Any = None  # made, but of the next epoch
        self._number = 0  # of the step that is handed out next

    def __len__(self) -> int:
        if (num_steps := self._run.steps_per_epoch) is None:
            raise TypeError("The number of optimizer steps in an epoch of this data is not known.")
        return num_steps

    def __iter__(self) -> Iterator[Any]:
        # A generator, whose body runs at the first `next`: a checkpoint has been restored.
        epoch, now = self._run.trainer.current_epoch, self._run.trainer.global_step
        if self._iterator is None or self._number != now:  # Lightning has not taken what it asked for, or just begins
            self.close()
            self._iterator, self._number = iter(self._steps), now
        while (step := self._next()) is not None and self._run.position(self._number + 1).epoch <= epoch:
            self._held = None
            self._number += 1
            yield step

    def _next(self) -> Any:
        if self._held is None and self._iterator is not None:
            self._held = next(self._iterator, None)
            if self._held is None:
                self._iterator = None
        return self._held

    def close(self) -> None:
        """End the workers."""
        self._iterator = self._held = None

    def state_dict(self) -> dict[str, int]:
        """Empty: a run's step says where to begin. Having it tells Lightning that the loader can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore here."""
