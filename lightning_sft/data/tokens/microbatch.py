"""One forward and backward pass: the tensors of some sequences, padded or packed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["packed", "padded"]


@dataclass(eq=False)
class Packing:
    """What separates the sequences of a packed row.

    Attributes:
        position_ids: Counted from 0 in each sequence, `(1, num_tokens)`.
        cu_seq_lens: Where sequences begin and end in the row, `(num_sequences + 1,)`, int32.
        max_length: Length of the longest sequence.
    """

    position_ids: Tensor
    cu_seq_lens: Tensor
    max_length: int


@dataclass(eq=False)
class Microbatch:
    """Sequences that go through the model together, shifted by one.

    Padded, each sequence has a row of its own, and shapes are `(num_sequences, longest)`; packed, all stand one after
    another in a single row, `(1, num_tokens)`. Position `i` of the labels is the token after position `i` of the
    inputs. Without any sequence there is one masked token, so that a device with nothing to do takes part.

    Attributes:
        input_ids: Token ids.
        labels: Token ids.
        response_mask: True where the label counts in the loss.
        response_positions: Positions of these labels in the flattened mask, `(num_response_tokens,)`.
        locations: Where each sequence comes from, such as `line 3`.
        lengths: Inputs of each sequence.
        packing: What separates the sequences; None if they are padded.
    """

    input_ids: Tensor
    labels: Tensor
    response_mask: Tensor
    response_positions: Tensor
    locations: list[str]
    lengths: list[int]
    packing: Packing | None = None

    @property
    def num_sequences(self) -> int:
        """0 where there is one masked token instead."""
        return len(self.locations)

    @property
    def max_length(self) -> int:
        """Inputs of the longest sequence."""
        return max(self.lengths, default=1)

    def holds_token(self) -> Tensor:
        """Where there is a token of a sequence, not padding, `(batch_size, sequence_length)`; bool, in main memory."""
        if self.packing is not None:
            return torch.full(self.input_ids.shape, bool(self.lengths))
        lengths = torch.tensor(self.lengths or [0])
        return torch.arange(self.input_ids.shape[1]) < lengths.unsqueeze(1)

    def model_inputs(self) -> dict[str, Any]:
        """What a model takes beside `input_ids`, by the names that `transformers` has; empty if padded."""
        if (packing := self.packing) is None:
            return {}
        return {
            "position_ids": packing.position_ids,
            "cu_seq_lens_q": packing.cu_seq_lens,
            "cu_seq_lens_k": packing.cu_seq_lens,
            "max_length_q": packing.max_length,
            "max_length_k": packing.max_length,
        }

    def to(self, device: torch.device | str) -> "Microbatch":
        """The same on a device; the host does not wait for a copy to CUDA."""
        non_blocking = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Microbatch":
        """The same in memory that CUDA copies from by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Microbatch":
        packing = self.packing
        if packing is not None:
            packing = Packing(function(packing.position_ids), function(packing.cu_seq_lens), packing.max_length)
        return replace(
            self,
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            response_mask=function(self.response_mask),
            response_positions=function(self.response_positions),
            packing=packing,
        )
