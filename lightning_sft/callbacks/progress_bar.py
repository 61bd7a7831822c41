"""The progress bar in optimizer steps."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's progress bar, over the optimizer steps of the whole run."""

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps of the run."""
        max_steps = self.trainer.max_steps
        return max_steps if max_steps >= 0 else math.inf

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar with the first epoch; it continues through the others."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the steps of the whole run."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics by short names, without the version number."""
        metrics = {
            name.removeprefix("train/"): value for name, value in super().get_metrics(trainer, pl_module).items()
        }
        metrics.pop("v_num", None)
        if "latest_loss" in metrics:
            metrics.setdefault("loss", metrics.pop("latest_loss"))
        if "tokens_per_second" in metrics:
            metrics["tokens/s"] = f"{metrics.pop('tokens_per_second'):,.0f}"
        return metrics
