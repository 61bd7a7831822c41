"""`LastCheckpoint`: where an interrupted run continues."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint


class LastCheckpoint(Checkpoint):
    """Saves `<log_dir>/checkpoints/last.ckpt` at each validation, at the end, and every so many steps.

    Lightning's `ModelCheckpoint(monitor=..., save_last=True)` keeps the best as the last, and misses the final step.

    Args:
        every_n_steps: Also save every so many optimizer steps.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` is {every_n_steps}, expected at least 1.")
        self.every_n_steps = every_n_steps
        self._saved_step: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A new run has saved nothing yet."""
        self._saved_step = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every_n_steps` optimizer steps."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after each validation of a training run."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save where the run ended."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # `log_dir` is a collective
        if trainer.fast_dev_run or self._saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
