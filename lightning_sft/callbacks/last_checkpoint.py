"""`LastCheckpoint`: where an interrupted run continues."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.callbacks.signals import DeferredSignals
from lightning_sft.checks import check_integer, check_type
from lightning_sft.errors import SettingsError
from lightning_sft.loops.trainer_state import (
    ends_here,
    exchange_no_signals,
    exchange_signals_again,
    log_latest_step,
    requeue_signal,
    validation_follows,
)
from lightning_sft.training.checkpoint_files import put_folder_behind_link, remove_partial, take_place, use_own_files
from lightning_sft.training.host_copy import HostCopy
from lightning_sft.training.run_folder import run_folder, writes_files
from lightning_sft.training.slurm_job import requeue_slurm_job, write_slurm_job


class LastCheckpoint(Checkpoint):
    """Saves `<log_dir>/checkpoints/last.ckpt` at each validation, at the end, every n steps, and on a stop signal.

    SIGTERM and Ctrl-C take effect at the end of the optimizer step, the same one on all devices: the run is saved and
    the process exits with 128 plus the signal's number. A second Ctrl-C stops it at once. SLURM's requeue signal takes
    effect there too. A checkpoint replaces the previous one only once it is complete. If Lightning saves a sharded
    model to a folder, `last.ckpt` is a link to that folder.

    Lightning's `ModelCheckpoint(monitor=..., save_last=True)` saves the best model as the last, and misses the final
    step. `trainer.fit(..., ckpt_path="last")` finds the files of that callback alone: give it the path of `last.ckpt`.

    Args:
        every_n_steps: Also save every n optimizer steps.
        requeue: At SLURM's requeue signal, save `last.ckpt`, requeue the job and stop; the restarted job must continue
            from that file, as `lightning-sft fit` does. False: pass the signal to Lightning, which saves
            `hpc_ckpt_<N>.ckpt` in `default_root_dir`, requeues the job, and loads that file when it is restarted.

    Attributes:
        best_model_path: The file of the latest `fit`, empty if there is none. Without a `ModelCheckpoint` this is what
            `trainer.test(datamodule=...)` evaluates.
    """

    def __init__(self, every_n_steps: int | None = None, requeue: bool = False) -> None:
        super().__init__()
        check_integer("every_n_steps", every_n_steps, at_least=1, optional=True)
        check_type("requeue", requeue, bool, "true or false")
        self.every_n_steps, self.requeue = every_n_steps, requeue
        self._saved_step: int | None = None
        self.best_model_path = ""  # Lightning asks for this name, and sets it after a `fit` in other processes
        self._signals = DeferredSignals()
        self._asked: HostCopy | None = None  # the signal that any device had received at the step before

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare for a new run. Refuse a second `LastCheckpoint`, which would not restore the signal handlers."""
        if sum(isinstance(each, LastCheckpoint) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise SettingsError(
                "There are two `LastCheckpoint`s, which would write the same file and take signals from one another. "
                "Keep one of them; on the command line `last_checkpoint` is one."
            )
        self._saved_step = None
        if stage == "fit":
            self.best_model_path = ""
        use_own_files(trainer)

    # -- when ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's signal handlers, which would save and exit in the middle of a step.

        Incomplete checkpoints are removed, such as those of a run that was killed.
        """
        requeue = requeue_signal(trainer)
        self._asked = None
        self._signals.catch({signal.SIGTERM, signal.SIGINT} | ({requeue} if requeue else set()))
        if exchange_no_signals(trainer):
            self._signals.received = signal.SIGTERM
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            remove_partial(folder)
        if requeue and self.requeue and writes_files(trainer):
            write_slurm_job(folder.parent)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every_n_steps` optimizer steps; stop if a signal has arrived."""
        is_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        # Where a validation follows, the run is saved after that, with what callbacks make of it.
        if is_due and not validation_follows(trainer, batch_idx):
            self._save(trainer)
        self._obey_signals(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after each validation of a training run."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)
            self._obey_signals(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save at the end of the run: later Lightning's `WeightAveraging` replaces the weights by their average."""
        if ends_here(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the signal handlers."""
        self._release(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers; while a signal is being obeyed, leave that to Lightning, at the very end."""
        if isinstance(exception, SystemExit):  # another signal, handled by Lightning, would disturb the end
            exchange_signals_again(trainer)
        else:
            self._release(trainer)

    # -- how -----------------------------------------------------------------------------------------------------

    def _release(self, trainer: L.Trainer) -> None:
        self._signals.release()
        exchange_signals_again(trainer)

    def _agreed_signal(self, trainer: L.Trainer) -> signal.Signals | None:
        """The signal that all devices obey at this step: the one that any of them had received at the step before.

        Asking about the step before makes no device wait for its host.
        """
        if trainer.world_size == 1:
            return self._signals.received
        earlier = 0 if self._asked is None else int(self._asked.read())
        received = torch.full((), self._signals.received or 0, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        self._asked = HostCopy(received)
        return signal.Signals(earlier) if earlier else None

    def _obey_signals(self, trainer: L.Trainer) -> None:
        number = self._agreed_signal(trainer)
        if number is None:
            return
        is_to_requeue = number not in (signal.SIGTERM, signal.SIGINT)
        if is_to_requeue:
            self._asked = None
        if is_to_requeue and not self.requeue:
            self._signals.hand_on(number)
            return
        self._save(trainer)
        if is_to_requeue and not trainer.strategy.broadcast(trainer.is_global_zero and requeue_slurm_job()):
            self._signals.received = None
            return
        log_latest_step(trainer)
        rank_zero_info(f"{number.name}: stopped after optimizer step {trainer.global_step}, which is saved.")
        raise SystemExit(128 + number)

    def _folder(self, trainer: L.Trainer) -> Path:
        return run_folder(trainer) / "checkpoints"

    def _save(self, trainer: L.Trainer) -> None:
        path = self._folder(trainer) / "last.ckpt"
        if trainer.fast_dev_run or self._saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return
        self._saved_step, self.best_model_path = trainer.global_step, str(path)
        for logger in trainer.loggers:  # what it holds back would not be logged again by a run that goes on from here
            logger.save()
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.save_checkpoint(path, weights_only=False)
            return
        partial = path.with_name(f".step_{trainer.global_step}.partial")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero and partial.is_dir():
            put_folder_behind_link(partial, path.with_name(f"step_{trainer.global_step}"), link=path)
        elif trainer.is_global_zero:
            take_place(partial, path)
        trainer.strategy.barrier("LastCheckpoint")
