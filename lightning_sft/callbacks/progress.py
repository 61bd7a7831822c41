"""The progress bar in optimizer steps, and tokens per second."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """Lightning's bar, counting the optimizer steps of the whole run."""

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps of the run."""
        max_steps = self.trainer.max_steps
        return max_steps if max_steps >= 0 else super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The metrics by short names, without the version number, which says nothing here."""
        metrics = {
            name.removeprefix("train/"): value for name, value in super().get_metrics(trainer, pl_module).items()
        }
        metrics.pop("v_num", None)
        if "tokens_per_second" in metrics:
            metrics["tokens/s"] = f"{metrics.pop('tokens_per_second'):,.0f}"
        return metrics


class TokenThroughput(L.Callback):
    """Logs `train/tokens_per_second`: tokens of prompts and responses, without padding, over all devices.

    The time is that of the optimizer steps alone. Put it before callbacks that do long work after a step.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        rate = batch["num_tokens"] / (time.perf_counter() - self._start)
        pl_module.log("train/tokens_per_second", rate, prog_bar=True)
