"""`EmbeddingNoise`: noise on the embeddings of each row (NEFTune), the same however rows are batched."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.checks import check_number


@dataclass(frozen=True)
class NoisyRows:
    """Which rows a forward pass has.

    Attributes:
        names: Of each row, such as where it comes from.
        lengths: Tokens of each row.
        packed: Whether the rows stand one after another in a single one, rather than each padded in one of its own.
        step: The optimizer step that they are part of.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    packed: bool
    step: int


class EmbeddingNoise:
    """Adds noise to the embeddings of rows while they are trained on.

    Each number is drawn uniformly from plus or minus `alpha / sqrt(length * hidden_size)`, with the length of the row
    itself, without padding, by a generator of the row's own, seeded by (seed, step, row). So the noise of a row does
    not depend on microbatches, layout or the number of devices; it does on their kind, since each draws other numbers.

    Args:
        alpha: How strong the noise is. None: there is none.
        seed: Of the run.

    Source: Jain et al. 2023 (arXiv:2310.05914).
    """

    def __init__(self, alpha: float | None, seed: int) -> None:
        check_number(
            "neftune_noise_alpha", alpha, "a positive number, or none", lambda it: 0 < it < math.inf, optional=True
        )
        self._alpha, self._seed = alpha or 0.0, seed
        self._rows: NoisyRows | None = None
        self._embeddings: nn.Module | None = None  # that ask for noise

    def install(self, model: PreTrainedModel) -> None:
        """Have a model's embeddings ask for noise from now on; do so before it is compiled, which would not notice."""
        embeddings = model.get_input_embeddings()
        if self._alpha and self._embeddings is not embeddings:
            embeddings.register_forward_hook(self._add)  # a method: a copy of the model has that of the copy
            self._embeddings = embeddings

    @contextmanager
    def on(self, rows: NoisyRows) -> Iterator[None]:
        """A context in which the model's embeddings are those of these rows, and get their noise."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add(self, _: nn.Module, __: tuple[Tensor, ...], embeddings: Tensor) -> Tensor | None:
        if (rows := self._rows) is None or not rows.lengths:  # a masked token, where a device has no row
            return None
        noise = torch.zeros_like(embeddings)
        spans = noise[0].split(list(rows.lengths)) if rows.packed else noise
        for name, length, span in zip(rows.names, rows.lengths, spans, strict=True):
            span[:length] = self._of_row(f"{self._seed} {rows.step} {name}", span[:length])
        return embeddings + noise

    def _of_row(self, key: str, like: Tensor) -> Tensor:
        digest = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest) >> 1)
        numbers = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
        return (2 * numbers - 1) * (self._alpha / math.sqrt(like.numel()))
