"""Memory and time of a run before it starts: no weights are read, no device is needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lightning_sft.callbacks.throughput import known_peak_flops
from lightning_sft.checks import check_number
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.steps.plan import MicrobatchShape, StepTotals, largest_allowed_microbatch
from lightning_sft.data.tokens.microbatch import Layout
from lightning_sft.errors import SettingsError, counted, located, one_line
from lightning_sft.model.builder import ModelBuilder
from lightning_sft.model.flops import training_flops
from lightning_sft.model.packing import why_never_packed
from lightning_sft.model.quantization import check_quantized
from lightning_sft.model.sharding import check_not_replicated, shards_per_replica
from lightning_sft.planning.quantized_weights import saved_by_quantization
from lightning_sft.planning.step_memory import Devices, StepMemory, convert, step_memory
from lightning_sft.planning.trainer_settings import TrainerSettings
from lightning_sft.training.module import SFTModule
from lightning_sft.training.state_memory import binary, parameter_counts

_STEPS_LOOKED_AT = 1000
_UNCOUNTED = (
    "Not counted: the CUDA context, allocator fragmentation, the workspace of kernels, generation, and what `compile` "
    "saves."
)


@dataclass(frozen=True)
class Estimate:
    """What a run needs; a `rich` console shows it.

    Attributes:
        parameters: How many, in words.
        memory: Of an optimizer step on each device, for values of `gradient_checkpointing`.
        gradient_checkpointing: The one that is set.
        run: What there is to compute, by name.
        notes: What the numbers rest on.
    """

    parameters: str
    memory: dict[bool | int, StepMemory]
    gradient_checkpointing: bool | int
    run: dict[str, str]
    notes: list[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, value in self.run.items():
            grid.add_row(name, value)
        yield f"{self.parameters}\n"
        yield self._memory_table()
        yield ""
        yield grid
        yield ""
        yield Text("\n".join(self.notes))  # no markup: a file's name may have brackets

    def _memory_table(self) -> Table:
        table = Table("memory on each device", box=None, pad_edge=False)
        for checkpointing in self.memory:
            words = f"gradient_checkpointing: {str(checkpointing).lower()}"
            is_set = checkpointing == self.gradient_checkpointing
            table.add_column(f"{words} (set)" if is_set else words, justify="right")
        steps = list(self.memory.values())
        lines: dict[str, Sequence[int | None]] = {
            "weights": [step.state.weights for step in steps],
            "gradients": [step.state.gradients for step in steps],
            "optimizer state": [step.state.optimizer for step in steps],
            "gathered weights, copies of gradients": [step.gathered for step in steps if step.gathered],
            "activations of a microbatch": [step.activations for step in steps],
            "peak of an optimizer step": [step.peak for step in steps],
        }
        for name, values in lines.items():
            if values:
                sizes = ["not known" if value is None else binary(value) for value in values]
                table.add_row(name, *sizes, style="bold" if name.startswith("peak") else "")
        return table


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
        mfu: Fraction of `peak_flops` that training is assumed to reach.
        peak_flops: Multiplications and additions per second that one device could do at most. Default: what Lightning
            knows of this machine's CUDA device, if that is what the run is for.
    """
    check_number("mfu", mfu, "a fraction above 0, at most 1", lambda value: 0 < value <= 1)
    settings = TrainerSettings.of(trainer)
    kind = "CUDA" if settings.on_cuda else "CPU"
    notes = [f"For {counted(settings.num_devices, f'{kind} device')}, {settings.precision}."]
    if trainer.get("accelerator") in (None, "auto") and not settings.on_cuda:
        notes.append("This machine has no GPU; for a run on one add `--trainer.accelerator gpu`.")
    num_shards = 1
    if settings.is_sharded:
        num_shards = shards_per_replica(settings.num_devices, module.num_replicas)
    else:
        check_not_replicated(module.num_replicas)
    model = module.builder.build_empty(settings.precision)
    layout = datamodule.layout or ("padded" if why_never_packed(model) else "packed")
    work = _work(datamodule, settings, layout)
    devices = Devices(
        on_cuda=settings.on_cuda,
        num_copies=1 if settings.is_sharded else settings.num_devices,
        num_shards=num_shards,
        whole_gradients=module.sync_every_microbatch is False,
    )
    saved = _saved_by_quantization(module.builder, settings, notes)
    memory = {
        checkpointing: step_memory(
            model,
            module.optimizer_factory,
            work.largest,
            layout,
            devices=devices,
            precision=settings.precision,
            gradient_checkpointing=checkpointing,
            token_loss=module.objective.token_loss,
            saved_by_quantization=saved,
        )
        for checkpointing in dict.fromkeys([False, True, module.checkpointing.gradient_checkpointing])
    }
    run = work.lines | {"largest microbatch": _in_words(work.largest, layout)}
    notes += work.notes
    if (totals := work.totals) is not None and (
        flops := training_flops(model, totals.num_tokens, totals.num_response_tokens, totals.num_attended)
    ) is not None:
        run["model FLOPs"] = f"{flops:.3g}"
        if peak_flops is None and settings.on_cuda and torch.cuda.is_available():
            peak_flops = known_peak_flops(torch.device("cuda"), settings.precision.compute_dtype)
        if peak_flops:
            time = _duration(flops / (peak_flops * settings.num_devices * mfu))
            run["time"] = f"{time}, if each device reaches {mfu:.0%} of {peak_flops:.3g} FLOP/s"
        else:
            notes.append("To estimate the time, give the device's FLOP/s as `--throughput.peak_flops`.")
    counts = parameter_counts(model.parameters())
    if module.checkpointing.activation_offloading:
        notes.append("`activation_offloading` needs less than this; how much less is not estimated.")
    return Estimate(counts, memory, module.checkpointing.gradient_checkpointing, run, [*notes, _UNCOUNTED])


def _saved_by_quantization(builder: ModelBuilder, trainer: TrainerSettings, notes: list[str]) -> int:
    base = builder.build_empty_base(trainer.precision)
    stored = getattr(base.config, "quantization_config", None)  # of a checkpoint that is quantised already
    if (settings := (builder.model_kwargs or {}).get("quantization_config", stored)) is None:
        return 0
    convert(base, trainer.precision.stored)
    try:
        saved = saved_by_quantization(base, settings)
    except SettingsError as error:
        notes.append(f"`quantization_config` is not considered, all weights are counted in full: {error}")
        return 0
    check_quantized(builder.lora is not None, trainer.is_sharded)
    return saved


@dataclass(frozen=True)
class _Work:
    """What a run has to do.

    Attributes:
        largest: The microbatch that takes the most memory.
        totals: Of the whole run, or of an epoch where only time ends it; None if the data cannot be read.
        lines: What to say of them, by name.
        notes: What that rests on.
    """

    largest: MicrobatchShape
    totals: StepTotals | None = None
    lines: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _work(datamodule: SFTDataModule, settings: TrainerSettings, layout: Layout) -> _Work:
    try:
        plan = datamodule.training_rows.plan(settings.num_devices)
    except (SettingsError, OSError) as error:
        reason = f"The data is not read: {one_line(error, 200)}"
        with located(reason.rstrip(".")):
            largest = largest_allowed_microbatch(datamodule.rule, datamodule.encoding.max_length, settings.num_devices)
        note = f"{reason} Every token counts as a response token."
        return _Work(largest, notes=[note])
    of_run = settings.num_steps(plan.steps_per_epoch)
    num_steps = of_run or plan.steps_per_epoch
    totals = plan.totals().times(num_steps / plan.steps_per_epoch)
    lines = {
        "optimizer steps": f"{num_steps:,}" if of_run else f"{num_steps:,} in an epoch",
        "tokens": f"{totals.num_tokens:,}, {totals.num_response_tokens:,} of them in responses",
    }
    note = "Of streamed data only the first rows are read; longer ones may follow."
    largest = plan.largest_microbatch(min(num_steps, _STEPS_LOOKED_AT), layout)
    return _Work(largest, totals, lines, [note] if datamodule.streaming else [])


def _in_words(shape: MicrobatchShape, layout: Layout) -> str:
    lengths, num_responses = shape.lengths, sum(shape.num_response_tokens)
    num_tokens = len(lengths) * max(lengths) if layout == "padded" else sum(lengths)
    return f"{num_tokens:,} tokens, {num_responses:,} in responses, {counted(len(lengths), 'sequence')}, {layout}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
