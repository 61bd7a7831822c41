"""Memory and time of a run before it starts: no weights are read, no device is needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lightning_sft.callbacks.throughput import known_peak_flops
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import SettingsError, one_line
from lightning_sft.model.attention import why_never_packed
from lightning_sft.model.flops import training_flops
from lightning_sft.model.precision import Precision
from lightning_sft.planning.step_memory import StepMemory, module_step_memory
from lightning_sft.training.module import SFTModule
from lightning_sft.training.state_memory import binary, parameter_counts

_STEPS_LOOKED_AT = 1000
_UNCOUNTED = (
    "Not counted: the CUDA context, what the allocator cannot use, what kernels need inside, generation, and what "
    "`compile` saves."
)


@dataclass(frozen=True)
class Estimate:
    """What a run needs; `print` and `rich` show it.

    Attributes:
        parameters: How many, in words.
        memory: Of an optimizer step on each device, without and with gradient checkpointing.
        is_checkpointing: Whether the settings ask for that.
        run: What there is to compute, by name.
        notes: What the numbers rest on.
    """

    parameters: str
    memory: dict[bool, StepMemory]
    is_checkpointing: bool
    run: dict[str, str]
    notes: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield f"{self.parameters}\n"
        table = Table("memory on each device", box=None, pad_edge=False)
        for checkpointing in self.memory:
            words = f"gradient_checkpointing: {str(checkpointing).lower()}"
            table.add_column(f"{words} (set)" if checkpointing == self.is_checkpointing else words, justify="right")
        steps = list(self.memory.values())
        unknown = "not known"
        lines = {
            "weights": [binary(step.state.weights) for step in steps],
            "gradients": [binary(step.state.gradients) for step in steps],
            "optimizer state": [
                unknown if step.state.optimizer is None else binary(step.state.optimizer) for step in steps
            ],
            "gathered weights, copies of gradients": [binary(step.gathered) for step in steps if step.gathered],
            "activations of a microbatch": [binary(step.activations) for step in steps],
            "peak of an optimizer step": [binary(step.peak) for step in steps],
        }
        for name, values in lines.items():
            if values:
                table.add_row(name, *values, style="bold" if name.startswith("peak") else "")
        yield table
        yield ""
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, value in self.run.items():
            grid.add_row(name, value)
        yield grid
        yield ""
        yield "\n".join(self.notes)


def estimate_run(
    module: SFTModule,
    datamodule: SFTDataModule,
    trainer: Mapping[str, Any],
    mfu: float = 0.4,
    peak_flops: float | None = None,
) -> Estimate:
    """Memory and time of `fit`.

    Args:
        module: With its settings, and no model yet.
        datamodule: The data; where it cannot be read here, its settings alone are used.
        trainer: Settings of the trainer.
        mfu: Share of the devices' arithmetic that is assumed to be put to use.
        peak_flops: Multiplications and additions per second that one device could do at most. Default: what Lightning
            knows of this machine's CUDA device, if that is what the run is for.

    Raises:
        ValueError: If `mfu` is no share, the model cannot be built, or nothing bounds a microbatch.
    """
    if not 0 < mfu <= 1:
        raise SettingsError(f"`mfu` is {mfu}, expected a share above 0, at most 1.")
    precision = _precision(trainer)
    on_cuda, devices = _device_type(trainer) == "cuda", _num_devices(trainer)
    sharded = "modelparallel" in _strategy(trainer).replace("_", "").lower()
    notes = [f"For {devices} {'CUDA' if on_cuda else 'CPU'} device{'s' if devices > 1 else ''}, {precision}."]
    if trainer.get("accelerator") in (None, "auto") and not on_cuda:
        notes.append("This machine has no GPU; for a run on one add `--trainer.accelerator gpu`.")
    model = module.empty_model(precision)
    layout = datamodule.layout or ("padded" if why_never_packed(model) else "packed")
    totals, run, num_steps = None, {}, None
    try:
        plan = datamodule.training_plan(devices)
    except (SettingsError, OSError) as error:
        notes.append(f"The data is not looked at: {one_line(error, 200)} Every token counts as one of a response.")
        shape = datamodule.microbatch_limit(devices)
    else:
        if datamodule.streaming:
            notes.append("Of streamed data the first rows alone are looked at; longer ones may follow.")
        num_steps = _num_steps(trainer, plan.steps_per_epoch)
        looked_at = min(num_steps or plan.steps_per_epoch, _STEPS_LOOKED_AT)
        shape = plan.largest_microbatch(looked_at, layout)
        epochs = (num_steps or plan.steps_per_epoch) / plan.steps_per_epoch
        totals = plan.totals().times(epochs)
        run["optimizer steps"] = f"{num_steps:,}" if num_steps else f"{plan.steps_per_epoch:,} in an epoch"
        run["tokens"] = f"{totals.num_tokens:,}, {totals.num_response_tokens:,} of them of responses"
    options: dict[str, Any] = {
        "layout": layout,
        "num_microbatches": shape.num_microbatches,
        "precision": precision,
        "on_cuda": on_cuda,
        "num_shards": devices if sharded else 1,
        "num_copies": 1 if sharded else devices,
    }
    lengths, responses = shape.lengths, shape.num_response_tokens
    memory = {
        checkpointing: module_step_memory(module, lengths, responses, gradient_checkpointing=checkpointing, **options)
        for checkpointing in (False, True)
    }
    width = len(lengths) * max(lengths) if layout == "padded" else sum(lengths)
    sequences = f"{len(lengths):,} sequence{'s' if len(lengths) > 1 else ''}"
    run["largest microbatch"] = f"{width:,} tokens, {sum(responses):,} of responses, {sequences}, {layout}"
    flops = None
    if totals is not None:
        flops = training_flops(model, totals.num_tokens, totals.num_response_tokens, totals.num_attended)
    if flops is not None:
        run["useful arithmetic"] = f"{flops:.3g} FLOPs"
        if peak_flops is None and on_cuda and torch.cuda.is_available():
            peak_flops = known_peak_flops(torch.device("cuda"), precision)
        if peak_flops:
            seconds = flops / (peak_flops * devices * mfu)
            run["time"] = f"{_duration(seconds)}, if {mfu:.0%} of {peak_flops:.3g} FLOP/s on each device is put to use"
        else:
            notes.append("For a time give the device's FLOP/s as `--throughput.peak_flops`.")
    notes.append(_UNCOUNTED)
    return Estimate(parameter_counts(model.parameters()), memory, module.gradient_checkpointing, run, notes)


def _precision(trainer: Mapping[str, Any]) -> Precision:
    precision = Precision.of(trainer.get("precision"))
    if precision.word.startswith("transformer-engine"):
        raise SettingsError(f"`precision` is '{precision}', whose copies in 8 bits are not estimated.")
    return precision


def _device_type(trainer: Mapping[str, Any]) -> str:
    accelerator = str(trainer.get("accelerator") or "auto")
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if accelerator in ("gpu", "cuda") else "cpu"


def _num_devices(trainer: Mapping[str, Any]) -> int:
    """Over all nodes; `auto` and -1 are those of this machine."""
    devices = trainer.get("devices") or "auto"
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if devices in ("auto", "-1", -1):
        devices = max(torch.cuda.device_count(), 1) if _device_type(trainer) == "cuda" else 1
    return (len(devices) if isinstance(devices, list) else int(devices)) * int(trainer.get("num_nodes") or 1)


def _strategy(trainer: Mapping[str, Any]) -> str:
    strategy = trainer.get("strategy") or "auto"
    return strategy if isinstance(strategy, str) else str(strategy["class_path"])


def _num_steps(trainer: Mapping[str, Any], steps_per_epoch: int) -> int | None:
    """Optimizer steps of the run; None if only time ends it."""
    max_steps, max_epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    limits = [max_steps] if max_steps not in (None, -1) else []
    limits += [max_epochs * steps_per_epoch] if max_epochs not in (None, -1) else []
    return min(limits, default=None)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
