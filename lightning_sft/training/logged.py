"""The numbers that a run logs."""

import lightning as L
import torch
from torch import Tensor

from lightning_sft.training.accumulation import StepSums
from lightning_sft.training.metrics import ResponseMetrics


def log_step(
    module: L.LightningModule, sums: StepSums, num_response_tokens: float, grad_norm: Tensor, on_host: dict[str, float]
) -> None:
    """Log an optimizer step.

    Args:
        module: That has taken it.
        sums: Of the step.
        num_response_tokens: Of the step, over all devices.
        grad_norm: Before clipping.
        on_host: Further numbers by name.
    """
    module.log("train/loss", sums.loss.float(), prog_bar=True)
    entropy = sums.token_entropy / num_response_tokens
    numbers = {"train/token_entropy": entropy.float(), "train/grad_norm": grad_norm.float()}
    if sums.router_loss is not None:
        numbers["train/router_loss"] = sums.router_loss.float()
    # A plain number would be copied to the device, which would have to be waited for; `bf16-true` would round it.
    numbers |= {f"train/{name}": torch.tensor(number, dtype=torch.float64) for name, number in on_host.items()}
    numbers["step"] = torch.tensor(module.global_step, dtype=torch.float64)  # every logger's x-axis
    module.log_dict(numbers)


def log_metrics(module: L.LightningModule, stage: str, metrics: ResponseMetrics) -> None:
    """Log the metrics of an evaluation as `<stage>/...`, and begin anew.

    Args:
        module: That is evaluated.
        stage: `val` or `test`.
        metrics: Are reset.
    """
    for name, value in metrics.compute().items():
        # Already over all devices; `sync_dist` averages equal numbers and keeps Lightning from warning.
        module.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
    metrics.reset()
