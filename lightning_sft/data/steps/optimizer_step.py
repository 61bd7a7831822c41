"""Everything that one optimizer step needs on one device."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.steps.marked_rows import batch_html, marked_rows
from lightning_sft.data.steps.plan import StepTotals
from lightning_sft.data.tokens.microbatch import Microbatch
from lightning_sft.errors import counted


@dataclass(eq=False)
class OptimizerStep:
    """An item of `train_dataloader`. A notebook displays its rows, with each token coloured by the mask.

    Attributes:
        microbatches: The microbatches of this device; their gradients are added up.
        totals: Numbers of sequences and tokens in the step over all devices.
        tokenizer: Decodes ids where the step is displayed. Copies and files have none, and show ids.
    """

    microbatches: list[Microbatch]
    totals: StepTotals
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @property
    def locations(self) -> list[str]:
        """Where the rows come from, such as `line 3`."""
        return [location for microbatch in self.microbatches for location in microbatch.locations]

    def to(self, device: torch.device | str) -> "OptimizerStep":
        """The same on a device."""
        return replace(self, microbatches=[microbatch.to(device) for microbatch in self.microbatches])

    def pin_memory(self) -> "OptimizerStep":
        """The same in memory that CUDA copies from by itself."""
        return replace(self, microbatches=[microbatch.pin_memory() for microbatch in self.microbatches])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.microbatches, self.totals)

    def _repr_html_(self) -> str:
        rows = [row for microbatch in self.microbatches for row in marked_rows(microbatch)]
        return batch_html(rows, self.tokenizer, f", {counted(len(self.microbatches), 'microbatch', 'es')}")
