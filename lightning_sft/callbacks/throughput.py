"""`TokenThroughput`: tokens per second, peak memory, and model FLOP utilisation."""

import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from transformers import PreTrainedModel

from lightning_sft.checks import check_number
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.plan import StepTotals
from lightning_sft.model.flops import training_flops
from lightning_sft.model.precision import Precision


class TokenThroughput(L.Callback):
    """Logs the speed of training, averaged from one logging step to the next.

    - `train/tokens_per_second`: tokens of prompts and responses, without padding, over all devices.
    - `train/response_tokens_per_second`: those of them that count in the loss.
    - `train/num_tokens`: how many the run has trained on so far, also before it was continued.
    - `train/peak_memory_gib`: on CUDA the peak memory of this process on its device since it was last logged;
      elsewhere the peak main memory of the process so far.
    - `train/mfu`, model FLOP utilisation: the model FLOP/s divided by the peak FLOP/s of all devices. Model FLOPs are
      those of the forward and backward passes of every token through the body, of every response token through the
      head, and of causal attention, without padding and without what is recomputed to save memory. It is not logged for
      mixtures of experts.

    Only the time of optimizer steps is measured, on CUDA by the device's own clock; the host waits for it only at
    logging steps. Put it before callbacks that do long work after a step.

    Args:
        peak_flops: Peak FLOP/s (multiplications and additions per second) of one device. Default: known for many CUDA
            devices, though not for the newest. Without it there is no `train/mfu`.

    Raises:
        SettingsError: If `peak_flops` is not positive.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        super().__init__()
        check_number("peak_flops", peak_flops, "a positive number", lambda value: value > 0, optional=True)
        self._peak_flops, self._num_tokens = peak_flops, 0

    def state_dict(self) -> dict[str, int]:
        """How many tokens the run has trained on."""
        return {"num_tokens": self._num_tokens}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting from there."""
        self._num_tokens = state_dict["num_tokens"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A new run counts from 0."""
        if stage == "fit" and trainer.global_step == 0:
            self._num_tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out the peak FLOP/s of the devices."""
        device = pl_module.device
        if self._peak_flops is None and device.type == "cuda":
            self._peak_flops = known_peak_flops(device, Precision.of(trainer.precision).compute_dtype)
        self._restart(device)

    def _restart(self, device: torch.device) -> None:
        self._timer = _DeviceTimer(device) if device.type == "cuda" else _HostTimer()
        self._totals = StepTotals()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._timer.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: OptimizerStep, batch_idx: int
    ) -> None:
        """Stop the clock; at a logging step, log."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._num_tokens += batch.totals.num_tokens
        if every <= 0:
            return
        self._timer.stop()
        self._totals += batch.totals
        if trainer.global_step % every == 0:
            self._log(trainer, pl_module)
            self._restart(pl_module.device)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds, totals = self._timer.seconds(), self._totals
        # In main memory: after every step to come Lightning reads it for progress bars.
        shown = torch.tensor(totals.num_tokens / seconds, dtype=torch.float64)
        pl_module.log("train/tokens_per_second", shown, prog_bar=True)
        rates = {"train/response_tokens_per_second": totals.num_response_tokens / seconds}
        pl_module.log("train/num_tokens", torch.tensor(self._num_tokens, dtype=torch.float64))
        if (peak := peak_memory(pl_module.device)) is not None:
            rates["train/peak_memory_gib"] = peak / 2**30
        model = getattr(pl_module, "model", None)
        if self._peak_flops is not None and isinstance(model, PreTrainedModel):
            flops = training_flops(model, totals.num_tokens, totals.num_response_tokens, totals.num_attended)
            if flops is not None:
                rates["train/mfu"] = flops / seconds / (self._peak_flops * trainer.world_size)
        pl_module.log_dict(rates)


class _HostTimer:
    """The time from each start to the stop after it, by the host's clock."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def start(self) -> None:
        self._start = time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """The sum."""
        return self._seconds


class _DeviceTimer:
    """The same by the clock of a CUDA device, which may get to a start long after the host has."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._start = self._event()

    def stop(self) -> None:
        self._spans.append((self._start, self._event()))

    def seconds(self) -> float:
        """The sum; the device is waited for."""
        self._spans[-1][1].synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in self._spans) / 1000

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


# Half precision without sparsity, by the data sheets: of devices that Lightning does not know, takes for another, or
# has another number of, with sparsity or without tensor cores; None where none is known. Of two names that are in a
# device's, the first counts.
_HALF_PRECISION_PEAKS = {
    " MIG ": None,  # a part of a device
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX A6000": 154.8e12,
    "RTX": None,
    "A40": 149.7e12,
    "T400": None,
}


def known_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Multiplications and additions per second that a CUDA device could do at most, in a type; None if unknown."""
    name = torch.cuda.get_device_name(device)
    for known, peak in _HALF_PRECISION_PEAKS.items():
        if known in name:
            return peak if dtype in (torch.bfloat16, torch.float16) else None
    return get_available_flops(device, dtype)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held: on CUDA since the last call, else since the process began; None if nothing counts them."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
