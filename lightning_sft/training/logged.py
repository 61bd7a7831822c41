"""The numbers that a run logs."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer

from lightning_sft.training.gradients import StepSums
from lightning_sft.training.guard import StepGuard
from lightning_sft.training.metrics import ResponseMetrics
from lightning_sft.training.run_facts import run_settings
from lightning_sft.training.schedule import steps_per_epoch


class DatedMetrics(L.LightningModule):
    """A module that notes after how many optimizer steps each metric of an evaluation was measured: `measured_at`."""

    guard: StepGuard

    def __init__(self) -> None:
        super().__init__()
        self.measured_at: dict[str, int] = {}

    @property
    def num_steps_taken(self) -> int:
        """Optimizer steps that have made these weights, also where they are only evaluated."""
        return self.global_step if self.trainer.state.fn == "fit" else self.guard.num_steps

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Log a metric."""
        if name.startswith(("val/", "test/")) and self._trainer is not None:  # without one Lightning logs nothing
            self.measured_at[name] = self.num_steps_taken
        super().log(name, *args, **kwargs)


def log_gradients(module: L.LightningModule, optimizer: Optimizer, grad_norm: Tensor) -> None:
    """Log the gradient norm before clipping, and the learning rate of the first parameter group."""
    rate = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64).clone()  # a schedule may overwrite it
    module.log_dict({"train/grad_norm": grad_norm.float(), "train/learning_rate": rate})


def log_step(module: L.LightningModule, sums: StepSums, num_response_tokens: float, guard: StepGuard) -> None:
    """Log an optimizer step that was taken.

    After each step Lightning reads what progress bars show, and waits for it if it is on a device. So they do not show
    `train/loss`, but the latest loss that is known in main memory, on a device that of the step before. It is not
    called `loss`, a name that a subclass may want: Lightning refuses two metrics of one name.
    """
    if guard.known_loss is not None:
        module.log("train/latest_loss", guard.known_loss.float(), prog_bar=True, logger=False)
    numbers = {
        "train/loss": sums.loss.float(),
        "train/token_entropy": (sums.token_entropy / num_response_tokens).float(),
    }
    if sums.router_loss is not None:
        numbers["train/router_loss"] = sums.router_loss.float()
    on_host: dict[str, float] = {"step": module.global_step}  # every logger's x-axis
    if guard.skips:
        on_host["train/skipped_steps"] = guard.num_skipped
    if in_epoch := steps_per_epoch(module.trainer):
        on_host["epoch"] = module.global_step / in_epoch
    # A plain number would be copied to the device, which would have to be waited for; `bf16-true` would round it.
    numbers |= {name: torch.tensor(number, dtype=torch.float64) for name, number in on_host.items()}
    module.log_dict(numbers)


def log_metrics(
    module: L.LightningModule, stage: str, metrics: ResponseMetrics, num_steps_taken: int | None = None
) -> None:
    """Log the metrics of an evaluation as `<stage>/...`, with the weights' step if it is given, and begin anew."""
    for name, value in metrics.compute().items():
        # Already over all devices; `sync_dist` averages equal numbers and keeps Lightning from warning.
        module.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
    if num_steps_taken is not None:
        module.log("step", float(num_steps_taken), sync_dist=True)
    if module.trainer.state.fn == "fit" and (in_epoch := steps_per_epoch(module.trainer)):
        module.log("epoch", module.global_step / in_epoch, sync_dist=True)
    metrics.reset()


def log_settings(module: L.LightningModule) -> None:
    """Tell the loggers what a run is made with, once its optimizers are there."""
    trainer = module.trainer
    for logger in trainer.loggers if trainer.enable_autolog_hparams else ():
        settings = run_settings(trainer)
        if isinstance(logger, MLFlowLogger):  # which refuses to change what a run that continues has logged before
            known = logger.experiment.get_run(logger.run_id).data.params if trainer.is_global_zero else {}
            settings = {name: value for name, value in settings.items() if name not in known}
        elif isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:  # which writes it only if it is missing
            Path(logger.log_dir, logger.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        logger.log_hyperparams(settings)
        logger.save()
