"""`find_batch_size`: the most tokens in a microbatch that a device has the memory for."""

import gc
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.memory import is_oom_error
from torch import nn

from lightning_sft.callbacks.throughput import peak_memory
from lightning_sft.checks import check_type
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.plan import BatchPlan, Layout, StepRule, microbatch_cost
from lightning_sft.data.step_loader import StepDataset
from lightning_sft.errors import SettingsError
from lightning_sft.planning.trial import Trial, run_trial
from lightning_sft.training.module import SFTModule

_FAILING = ("cuda",)  # devices on which running out of memory is an error that a program survives
_TOLERANCE = 0.05  # between the largest size that worked and the smallest that did not
_CONTROL_GROUPS = (  # of the second and of the first version; as a container sees its own
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_RISE, _CLEAR_RISE = 2**22, 2**26  # bytes; less says nothing of main memory


@dataclass(frozen=True, repr=False)
class BatchSizes:
    """What a device has the memory for; `print` it.

    Args:
        max_tokens_per_microbatch: To set: `margin` below `most_tokens`, and at least the longest row.
        batch_size: Rows of this data, even the longest, that fit into one microbatch of so many tokens.
        most_tokens: That worked, or in main memory, where nothing may fail, that would by the line through two peaks.
        tried: What was tried: tokens, and the peak in bytes, or None where memory ran out.
        memory: Bytes that there are.
        longest: Tokens of the longest row, as the model sees it.
        num_rows: Of the data; None if it is streamed, and only its first rows were looked at.
        margin: Share that is left free.
    """

    max_tokens_per_microbatch: int
    batch_size: int
    most_tokens: int
    tried: list[tuple[int, float | None]]
    memory: float
    longest: int
    num_rows: int | None
    margin: float

    def __str__(self) -> str:
        lines = [f"{'tokens in a microbatch':>22}  {'peak memory':>11}"]
        for size, peak in sorted(self.tried, key=lambda each: each[0]):
            lines.append(f"{size:>22,}  {'too much' if peak is None else f'{peak / 2**30:.2f} GiB':>11}")
        all_rows = self.batch_size == self.num_rows
        return "\n".join(
            [
                *lines,
                f"In {self.memory / 2**30:.2f} GiB, {self.most_tokens:,} tokens are the most. {self.margin:.0%} fewer "
                f"leave room for what a run needs besides. The longest row has {self.longest:,} tokens.",
                f"--data.max_tokens_per_microbatch {self.max_tokens_per_microbatch}",
                "This bounds the memory, so any `batch_size` fits: larger steps are split. "
                + ("All of the data fits" if all_rows else f"Up to {self.batch_size:,} rows, even the longest, fit")
                + " into one microbatch, without a split.",
            ]
        )

    __repr__ = __str__


def find_batch_size(
    module: SFTModule,
    datamodule: SFTDataModule,
    memory_gib: float | None = None,
    margin: float = 0.1,
    **trainer_options: Any,
) -> BatchSizes:
    """Find the largest `max_tokens_per_microbatch` by trying; and the largest `batch_size` that needs no split.

    Each try is an optimizer step on two microbatches of made-up rows, as long as the longest of the data, with every
    token a response token: what a step of so many tokens in a microbatch takes at most. On CUDA sizes double until
    memory runs out, then the gap is halved until it is 5%. In main memory, where running out ends the process, sizes
    double while the next one should fit, and a line through the last two peaks says how far it would go. Afterwards
    module and data are as before, but for the model, which is loaded.

    Args:
        module: The model, with the optimizer of the run.
        datamodule: The data; its longest row counts, and its `layout`.
        memory_gib: Memory of the process, in GiB. Default: on CUDA all that is free; else what the machine, or its
            control group, has free.
        margin: Share of the tokens that is left out, for what tries do not show: fragments of memory, generations.
        **trainer_options: Of the run's trainer, such as `precision` and `accelerator`.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range, there is more than one device, or the memory is too small for the
            longest row.
    """
    check_type("memory_gib", 1 if memory_gib is None else memory_gib, Real, "a number of GiB")
    check_type("margin", margin, Real, "a share")
    if memory_gib is not None and not memory_gib > 0:
        raise SettingsError(f"`memory_gib` is {memory_gib}, expected a positive number.")
    if not 0 <= margin < 1:
        raise SettingsError(f"`margin` is {margin}, expected a share: at least 0, below 1.")
    lengths = datamodule.row_lengths()
    search = _Search(datamodule, lengths[0], sum(lengths), memory_gib)
    options = trainer_options | {"limit_train_batches": None, "overfit_batches": 0.0, "enable_progress_bar": False}
    try:
        run_trial(search, module, 1, options, loader=_FirstStep(search, module))
    except RuntimeError as error:
        if not _ran_out(error):
            raise
    if not search.most_tokens:
        raise SettingsError(
            f"Of memory there are {search.memory / 2**30:.2f} GiB, too little for one row of {lengths[0]} tokens, the "
            "longest. Set `gradient_checkpointing`, lower `max_length`, or share the model out (configs/fsdp.yaml)."
        )
    most = max(int(search.most_tokens * (1 - margin)), lengths[0])
    rows = bisect_right(
        range(1, len(lengths) + 1), most, key=lambda end: microbatch_cost(lengths, 0, end, search.layout)
    )
    return BatchSizes(
        max_tokens_per_microbatch=most,
        batch_size=rows,
        most_tokens=search.most_tokens,
        tried=search.tried,
        memory=search.memory,
        longest=lengths[0],
        num_rows=None if datamodule.streaming else len(lengths),
        margin=margin,
    )


class _Search(Trial):
    """Tries sizes once the first step, on the longest row alone, has allocated the optimizer's state."""

    def __init__(self, datamodule: SFTDataModule, longest: int, end: int, memory_gib: float | None) -> None:
        self._datamodule, self.longest, self._end, self._memory_gib = datamodule, longest, end, memory_gib
        self.layout: Layout = "packed"
        self.memory = (memory_gib or 0.0) * 2**30
        self.most_tokens = 0
        self.tried: list[tuple[int, float | None]] = []

    def check(self, trainer: L.Trainer) -> None:
        """One device that says what it holds."""
        super().check(trainer)
        kind = trainer.strategy.root_device.type
        if trainer.world_size > 1:
            raise SettingsError(
                f"`devices` are {trainer.world_size}, but where memory runs out on one, the others would wait for it. "
                "Set `devices` to 1 and `strategy` to auto; `ddp` then needs room for the gradients a second time."
            )
        if kind not in ("cuda", "cpu"):
            raise SettingsError(f"`accelerator` is {kind}, whose memory is not counted; expected cuda or cpu.")
        if kind == "cuda" and not self.memory:
            self.memory = float(torch.cuda.mem_get_info(trainer.strategy.root_device)[0])
        elif kind == "cpu" and not Path("/proc/meminfo").is_file():
            raise SettingsError("This system does not say how much main memory is in use; expected Linux.")
        elif not self.memory:
            self.memory = resident_memory() + free_memory()

    def batch(self, size: int, module: SFTModule) -> dict[str, Any]:
        """A step of two microbatches of so many tokens each, in the longest rows, all of them response tokens."""
        self.layout = self._datamodule.layout_for(module)
        num_rows = -(-size // self.longest)
        lengths = [-(-size // num_rows)] * num_rows
        if self.layout == "packed":
            lengths = [self.longest] * (num_rows - 1) + [size - self.longest * (num_rows - 1)]
        random = np.random.default_rng(0)  # alike tokens would choose the same expert
        vocab_size = cast(nn.Embedding, module.model.get_input_embeddings()).num_embeddings
        columns = {
            "input_ids": [random.integers(vocab_size, size=length + 1) for length in lengths],
            "num_prompt_tokens": [1] * num_rows,
            "excluded_spans": [[]] * num_rows,
            "location": ["made up"] * num_rows,
        }
        plan = BatchPlan(lengths, lengths, StepRule(batch_size=num_rows))
        batch = StepDataset(Dataset.from_dict(columns), plan, 0, 0, self.layout)[0]
        # Forward through the second finds the gradients of the first, which a step of one alone never does.
        return batch | {"microbatches": 2 * batch["microbatches"]}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Search."""
        kept = 0 if pl_module.device.type == "cuda" else sum(value.nbytes for value in self.saved.values())

        def peak(size: int) -> float | None:
            found = None
            batch = self.batch(size, cast(SFTModule, pl_module))
            _forget_peak(pl_module.device)
            try:
                trainer.strategy.training_step(trainer.strategy.batch_to_device(batch), 0)
                found = float(cast(int, peak_memory(pl_module.device)) - kept)
            except RuntimeError as error:
                if not _ran_out(error):
                    raise
            # Only now does no traceback hold the step's tensors any more.
            gc.collect()
            torch.cuda.empty_cache()
            self.tried.append((size, found))
            rank_zero_info(f"{size:,} tokens: " + ("too many" if found is None else f"{found / 2**30:.2f} GiB"))
            return found

        if pl_module.device.type in _FAILING:
            self.most_tokens = largest_size(
                lambda size: (peak(size) or math.inf) <= self.memory, self.longest, self._end
            )
        else:
            held = resident_memory() - kept
            self.most_tokens = size_by_line(peak, self.longest, self._end, self.memory, held)


class _FirstStep:
    """A loader of the longest row alone, made when it is asked for: the model is not loaded before."""

    def __init__(self, search: _Search, module: SFTModule) -> None:
        self._search, self._module = search, module

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield self._search.batch(self._search.longest, self._module)


def _forget_peak(device: torch.device) -> None:
    """Have the peak counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not everywhere, and not in every container
            Path("/proc/self/clear_refs").write_text("5")


def _ran_out(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error) or "ALLOC_FAILED" in str(error)


def largest_size(fits: Callable[[int], bool], start: int, end: int) -> int:
    """The largest size that fits, to within 5%: doubling, then halving the gap. 0 if `start` does not fit.

    Args:
        fits: Asked about no size twice.
        start: The smallest of interest.
        end: The largest of interest.
    """
    if not fits(start):
        return 0
    works, fails = start, end + 1
    size = min(2 * works, end)
    while size > works:
        if fits(size):
            works = size
        else:
            fails = size
        if fails > end:
            size = min(2 * works, end)
        else:
            size = (works + fails) // 2 if fails - works > max(1, _TOLERANCE * works) else works
    return works


def size_by_line(peak: Callable[[int], float | None], start: int, end: int, memory: float, held: float) -> int:
    """The largest size whose peak should stay within the memory, without going there. 0 if that of `start` does not.

    Sizes double until the peak has risen clearly twice, or the next one may not fit. The last rise says how much more a
    token takes.

    Args:
        peak: The most bytes that the process held while it tried a size; or since it began, where that is unknown.
        start: The smallest of interest.
        end: The largest of interest.
        memory: Bytes.
        held: Bytes that the process holds in between: no size takes less.
    """
    tried: list[tuple[int, float]] = []
    size = start
    while True:
        now = peak(size)
        if now is None or now > memory:
            return max((each for each, _ in tried), default=0)
        tried.append((size, now))
        if size == end:
            return end
        # The first rise may only be from what was held before.
        rises = [after - before for (_, before), (_, after) in pairwise(tried)][-2:]
        if 2 * now - held > memory or (len(rises) == 2 and min(rises) > _CLEAR_RISE):
            break
        size = min(2 * size, end)
    of_token = (now - held) / size  # or less
    if len(rises) == 2 and min(rises) > _RISE:
        of_token = rises[-1] / (size - tried[-2][0])
    return max(size, min(int(size + (memory - now) / of_token), end))


def resident_memory() -> float:
    """Bytes of main memory that this process holds."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> float:
    """Bytes of main memory that the machine, and this process's control group, still have; caches count as free."""
    (available,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    free = float(available.split()[1]) * 1024
    for folder, limit, usage, cache in _CONTROL_GROUPS:
        try:
            most, used = (float((Path(folder) / name).read_text()) for name in (limit, usage))  # or "max"
            counts = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        free = min(free, most - used + float(counts.get(cache, 0)))
    return free
