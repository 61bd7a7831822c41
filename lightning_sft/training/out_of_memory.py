"""Training steps in which a device runs out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.utilities.memory import is_oom_error

from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.steps.optimizer_step import OptimizerStep


def ran_out(error: RuntimeError) -> bool:
    """Whether the error is that of a device without enough memory."""
    return isinstance(error, torch.OutOfMemoryError) or is_oom_error(error) or "ALLOC_FAILED" in str(error)


@contextmanager
def naming_way_out(trainer: L.Trainer, step: OptimizerStep) -> Iterator[None]:
    """Where memory runs out, add to the error's own message how large the microbatches are, and what limits them."""
    try:
        yield
    except RuntimeError as error:
        if ran_out(error):
            data = getattr(trainer, "datamodule", None)
            limit = data.rule.max_tokens_per_microbatch if isinstance(data, SFTDataModule) else None
            largest = max(each.input_ids.numel() for each in step.microbatches)
            error.add_note(
                f"The largest microbatch of this optimizer step has {largest:,} tokens on this device, and "
                f"`data.max_tokens_per_microbatch` is {'not set' if limit is None else limit}. Set it to less than "
                f"{largest:,}: a step then has more microbatches and the same result. `lightning-sft find_batch_size` "
                "finds what fits on this device, `lightning-sft estimate` says what takes how much memory."
            )
        raise
