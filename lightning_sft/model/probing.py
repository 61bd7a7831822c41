"""Runs a few short documents through a model, to find out what it does rather than to trust its settings."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft.model.attention import packed_inputs
from lightning_sft.model.modes import evaluating
from lightning_sft.model.routing import RoutingRecorder

# What a model raises if it does not take a call: because of a shape, a type, an argument, or one that is missing.
CALL_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError)


class Probe:
    """Calls a model with made-up documents, as it is called in training, but in eval mode and without gradients.

    Attributes:
        model: The model, on the device that it is to be trained on.
        half: The half precision that matrices are multiplied in: `dtype`, or else that of the weights. Logits are then
            known to two digits only. None: they are multiplied in float32 or float64.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
        self.model = model
        dtypes = (dtype, *(weight.dtype for weight in model.parameters()))
        self.half = next((each for each in dtypes if each in (torch.float16, torch.bfloat16)), None)

    def document(self, length: int, seed: int) -> Tensor:
        """Token ids, `(length,)`, none of which is likely to mean anything special."""
        vocab_size = self.model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size // 4, max(1, vocab_size // 4 * 3), (length,), generator=generator)
        return ids.to(self.model.device)

    def logits(self, input_ids: Tensor, packing: Mapping[str, Any] | None = None) -> Tensor:
        """The model's logits, `(batch_size, length, vocab_size)`, float64; `packing` is as for `packed_inputs`."""
        with self._as_in_training():
            inputs = packed_inputs(self.model, packing or {})
            output: Tensor = self.model(input_ids=input_ids, use_cache=False, **inputs).logits
        return output.double()

    def loss(self, input_ids: Tensor, routing: RoutingRecorder) -> float:
        """The loss that the model computes by itself, each token being the label of the one before."""
        with self._as_in_training(routing):
            return float(self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss)

    def packed_logits(self, *documents: Tensor) -> tuple[Tensor, ...]:
        """The logits of documents one after another in a row, `(length, vocab_size)` for each."""
        lengths = torch.tensor([len(document) for document in documents])
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int().to(self.model.device)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        packing = {
            "position_ids": positions.to(self.model.device).unsqueeze(0),
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
        }
        return tuple(self.logits(torch.cat(documents).unsqueeze(0), packing)[0].split(lengths.tolist()))

    @contextmanager
    def _as_in_training(self, routing: RoutingRecorder | None = None) -> Iterator[None]:
        kind = self.model.device.type
        with (
            torch.compiler.set_stance("force_eager"),
            evaluating(self.model),
            routing or RoutingRecorder(self.model),
            # Adapters may be float32 beside half-precision weights.
            torch.autocast(kind, self.half, enabled=self.half is not None),
            torch.random.fork_rng([self.model.device] if kind == "cuda" else []),
        ):
            yield


def relative_difference(given: Tensor, expected: Tensor) -> float:
    """How far logits are from what is expected, relative to how far that is from its mean."""
    spread = (expected - expected.mean()).norm()
    return float((given - expected).norm() / spread.clamp(min=1e-30))
