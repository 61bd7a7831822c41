"""`find_batch_size`: the most tokens in a microbatch that a device has the memory for."""

import gc
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_sft.checks import check_number
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.steps.microbatch_cuts import microbatch_cost
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.plan import StepTotals
from lightning_sft.data.tokens.collation import collate
from lightning_sft.data.tokens.example import Example
from lightning_sft.errors import SettingsError
from lightning_sft.planning.trial import Trial, run_trial
from lightning_sft.training.module import SFTModule
from lightning_sft.training.out_of_memory import ran_out

_DEVICE = "cuda"  # where a program survives running out of memory
_TOLERANCE = 0.05  # between the largest size that worked and the smallest that did not


@dataclass(frozen=True, repr=False)
class BatchSizes:
    """The batch sizes that fit into a device's memory; `print` shows them.

    Args:
        max_tokens_per_microbatch: The suggested setting: `most_tokens` less the margin, and at least the longest row.
        batch_size: Number of rows of this data, even the longest, that fit into one microbatch of this many tokens.
        most_tokens: The largest number of tokens per microbatch that fitted.
        tried: Each number of tokens that was tried, with the peak memory in bytes, or None if memory ran out.
        memory: Bytes that a run may use.
        longest: Tokens of the longest row, as the model sees it.
        num_tokens: Tokens of all rows that were read: the largest size that is tried.
        num_rows: Number of rows in the data; None if it is streamed, so that only its first rows were read.
        margin: Fraction of the tokens that is left out.
    """

    max_tokens_per_microbatch: int
    batch_size: int
    most_tokens: int
    tried: list[tuple[int, int | None]]
    memory: float
    longest: int
    num_tokens: int
    num_rows: int | None
    margin: float

    def __str__(self) -> str:
        lines = [f"{'tokens in a microbatch':>22}  {'peak memory':>11}"]
        for size, peak in sorted(self.tried, key=lambda each: each[0]):
            lines.append(f"{size:>22,}  {'too much' if peak is None else f'{peak / 2**30:.2f} GiB':>11}")
        all_rows = self.batch_size == self.num_rows
        tokens, memory = f"{self.most_tokens:,} tokens", f"{self.memory / 2**30:.2f} GiB"
        if self.most_tokens < self.num_tokens:
            found = f"{tokens} at most fit into {memory}."
        else:
            found = f"All {tokens} of the rows that were read fit into {memory}; larger sizes were not tried."
        return "\n".join(
            [
                *lines,
                f"{found} {self.margin:.0%} fewer leave room for other needs of a run. "
                f"The longest row has {self.longest:,}.",
                f"--data.max_tokens_per_microbatch {self.max_tokens_per_microbatch}",
                "This limits the memory, so any `batch_size` fits: larger steps are split. "
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
    """Find the largest `max_tokens_per_microbatch` by trying, and the largest `batch_size` that needs no split.

    Each try is an optimizer step on two microbatches of synthetic rows, as long as the longest row of the data, in
    which every token is a response token: no step of the data with as many tokens in a microbatch takes more memory.
    Sizes double until memory runs out, then the interval between what fits and what does not is halved until it is 5%.
    Afterwards module and data are as before, except that the model is loaded.

    Args:
        module: The model, with the optimizer of the run.
        datamodule: The data, of which the longest row and the `layout` matter.
        memory_gib: Memory of the CUDA device that the process may use, in GiB. Default: all that is free.
        margin: Fraction of the tokens to leave out, for memory that the tries do not show: fragmentation, and
            generations.
        **trainer_options: Arguments of the run's trainer, such as `precision`.

    Raises:
        SettingsTypeError: If an argument is not a number.
        SettingsError: If an argument is out of range, there is no CUDA device or more than one, or the memory is too
            small for the longest row.
    """
    check_number("memory_gib", memory_gib, "a positive number of GiB", lambda value: value > 0, optional=True)
    check_number("margin", margin, "a fraction: at least 0, below 1", lambda value: 0 <= value < 1)
    lengths = datamodule.training_rows.lengths()
    steps = _MadeUpSteps(module, datamodule, lengths[0])
    search = _Search(steps, sum(lengths), memory_gib)
    options = trainer_options | {"limit_train_batches": None, "overfit_batches": 0.0, "enable_progress_bar": False}
    try:
        run_trial(search, module, 1, options, loader=steps)
    except RuntimeError as error:
        if not ran_out(error):
            raise
    if not search.most_tokens:
        raise SettingsError(
            f"There are {search.memory / 2**30:.2f} GiB of memory, too little for one row of {lengths[0]} tokens, the "
            "longest. Set `gradient_checkpointing`, lower `max_length`, or shard the model (configs/fsdp.yaml)."
        )
    most, layout = max(int(search.most_tokens * (1 - margin)), lengths[0]), datamodule.layout_for(module)
    rows = bisect_right(range(1, len(lengths) + 1), most, key=lambda end: microbatch_cost(lengths, 0, end, layout))
    return BatchSizes(
        max_tokens_per_microbatch=most,
        batch_size=rows,
        most_tokens=search.most_tokens,
        tried=search.tried,
        memory=search.memory,
        longest=lengths[0],
        num_tokens=sum(lengths),
        num_rows=None if datamodule.streaming else len(lengths),
        margin=margin,
    )


class _MadeUpSteps:
    """Optimizer steps of two microbatches of made-up rows, as long as the longest of the data, without prompts.

    As a loader it has one step, with the longest row alone in a microbatch. It is made when it is asked for: before, no
    model is loaded that could say how its rows are laid out.
    """

    def __init__(self, module: SFTModule, datamodule: SFTDataModule, longest: int) -> None:
        self._module, self._datamodule, self.longest = module, datamodule, longest

    def __iter__(self) -> Iterator[OptimizerStep]:
        yield self.of_size(self.longest)

    def of_size(self, size: int) -> OptimizerStep:
        """The step of so many tokens in each microbatch."""
        layout = self._datamodule.layout_for(self._module)
        num_rows = -(-size // self.longest)
        lengths = [-(-size // num_rows)] * num_rows
        if layout == "packed":
            lengths = [self.longest] * (num_rows - 1) + [size - self.longest * (num_rows - 1)]
        random = np.random.default_rng(0)  # a mixture of experts would send equal tokens to the same expert
        vocab_size = cast(nn.Embedding, self._module.model.get_input_embeddings()).num_embeddings
        rows = [random.integers(vocab_size, size=length + 1).tolist() for length in lengths]
        microbatch = collate([Example(ids, num_prompt_tokens=1, location="made up") for ids in rows], layout)
        # While the second goes forward the gradients of the first are held, which a step of one never shows.
        return OptimizerStep([microbatch, microbatch], StepTotals(2 * num_rows, 2 * sum(lengths), 2 * sum(lengths)))


class _Search(Trial):
    """Tries sizes once the first step, on the longest row alone, has allocated the optimizer's state."""

    def __init__(self, steps: _MadeUpSteps, end: int, memory_gib: float | None) -> None:
        self._steps, self._end = steps, end
        self.memory = (memory_gib or 0.0) * 2**30
        self.most_tokens = 0
        self.tried: list[tuple[int, int | None]] = []

    def check(self, trainer: L.Trainer) -> None:
        """Refuse anything but one CUDA device."""
        super().check(trainer)
        device = trainer.strategy.root_device
        if device.type != _DEVICE:
            raise SettingsError(
                f"`accelerator` is {device.type}, where running out of memory would end this program: sizes are only "
                "tried on a CUDA device. `lightning-sft estimate` computes the memory of a step on any machine."
            )
        if trainer.world_size > 1:
            raise SettingsError(
                f"`devices` are {trainer.world_size}, but if memory runs out on one, the others would wait for it. Set "
                "`devices` to 1 and `strategy` to auto; `ddp` then needs room for the gradients a second time."
            )
        self.memory = self.memory or float(torch.cuda.mem_get_info(device)[0])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Search."""

        def fits(size: int) -> bool:
            peak = self._peak(trainer, size)
            self.tried.append((size, peak))
            rank_zero_info(f"{size:,} tokens: " + ("too many" if peak is None else f"{peak / 2**30:.2f} GiB"))
            return peak is not None and peak <= self.memory

        self.most_tokens = largest_size(fits, self._steps.longest, self._end)

    def _peak(self, trainer: L.Trainer, size: int) -> int | None:
        """The most bytes that a step of this size holds at one time; None if memory runs out."""
        device, peak = trainer.strategy.root_device, None
        batch = self._steps.of_size(size)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            trainer.strategy.training_step(trainer.strategy.batch_to_device(batch), 0)
            peak = torch.cuda.max_memory_allocated(device)
        except RuntimeError as error:
            if not ran_out(error):
                raise
        # Only now does no traceback hold the step's tensors any more.
        gc.collect()
        torch.cuda.empty_cache()
        return peak


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
