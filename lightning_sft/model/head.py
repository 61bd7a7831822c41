"""The language-model head without its logits: log-probabilities, entropies and gradients, tile by tile.

`torch.nn.functional.linear_cross_entropy` has neither entropies nor a scale nor a cap, and was slower on CPU.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sft.model.tiles import (
    Block,
    LogitTransform,
    ScoringSettings,
    TiledHead,
    Tiling,
    WeightTile,
    float32_or_more,
)


@dataclass(frozen=True)
class Head:
    """How logits follow from hidden states: `transform.apply(hidden @ weight.T + bias)`.

    Attributes:
        weight: `(vocab_size, hidden_size)`.
        bias: `(vocab_size,)`, if there is one.
        transform: What the model does to the products; by default nothing.
    """

    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = field(default_factory=LogitTransform)


@dataclass(frozen=True)
class ResponseScores:
    """Scores of labels, one after another.

    Attributes:
        log_probs: Log-probability of each label in nats, `(num_tokens,)`. Detached if there is a `loss`.
        token_entropy: Entropy of the distribution that the label is from, in nats, `(num_tokens,)`. Detached.
        is_top1: Whether the label is the first token with the highest logit, `(num_tokens,)`, if that was asked for.
        loss: A weighted sum of the negative log-probabilities, a scalar, if that was asked for.
    """

    log_probs: Tensor
    token_entropy: Tensor
    is_top1: Tensor | None = None
    loss: Tensor | None = None


def score_labels(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    return_is_top1: bool = False,
    tiling: Tiling | None = None,
) -> ResponseScores:
    """Log-probability of each label and entropy of its distribution, without keeping logits.

    Equals `log_softmax(logits)[labels]` and `compute_entropy(logits)`. Matrices are multiplied in autocast's type, or
    else the hidden states'; everything else is float32 (float64 for float64). Memory does not grow with
    `num_tokens * vocab_size`.

    Args:
        hidden: What the head is applied to, `(num_tokens, hidden_size)`.
        head: The head.
        labels: `(num_tokens,)`.
        token_weights: `(num_tokens,)`. Given, the result also has `loss = -sum(token_weights * log_probs)`, whose
            gradient is computed on the way: three matrix products instead of the four that an unknown gradient of
            the log-probabilities needs, since no logits have to be computed again.
        return_is_top1: Also return `is_top1`.
        tiling: How the logits are divided into tiles. Default: as suits the device.
    """
    device_type = hidden.device.type
    settings = ScoringSettings(
        transform=head.transform,
        dtype=torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype,
        return_is_top1=return_is_top1,
        tiling=tiling or Tiling.for_device(device_type),
    )
    with torch.autocast(device_type, enabled=False):
        loss, log_probs, entropy, is_top1 = _Scores.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, labels, token_weights, settings
        )
    return ResponseScores(log_probs, entropy, is_top1, loss)


class _Needed(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


class _Gradients:
    """The gradients of `sum(token_weights * (log_sum - label_logit))`, gathered tile by tile.

    Rows differ by a coefficient only, which is put on the hidden states rather than on the vocabulary. A matrix
    product sums in float32 whatever its type, but half-precision products of many blocks, added in half precision,
    would lose what is small beside their sum. What each addition rounds off is therefore kept and added to the next:
    as exact as a float32 sum, in half its memory.
    """

    def __init__(self, needed: _Needed, hidden: Tensor, head: TiledHead, num_blocks: int = 1) -> None:
        self._head, self._scale = head, head.settings.transform.scale
        weight, bias = head.weight, head.bias
        precise = float32_or_more(hidden[:0]).dtype
        self.hidden = torch.zeros_like(hidden, dtype=precise) if needed.hidden else None
        self.weight = torch.zeros_like(weight) if needed.weight else None
        self.bias = torch.zeros_like(bias, dtype=precise) if bias is not None and needed.bias else None
        rounds = needed.weight and weight.dtype.itemsize < 4 and num_blocks > 1
        self._rounded_off = torch.zeros_like(weight) if rounds else None

    def add_tile(
        self, rows: slice, weight_tile: WeightTile, hidden: Tensor, gradient: Tensor, coefficient: Tensor
    ) -> None:
        """Add some rows' part on a tile.

        Args:
            rows: Which of all rows they are.
            weight_tile: The tile.
            hidden: The rows' hidden states.
            gradient: The tile's, by the logits before they were capped, `(rows, width)`.
            coefficient: Probability of the tile times the token weights, `(rows,)`.
        """
        tokens, weight = weight_tile
        coefficient = (coefficient * self._scale).unsqueeze(-1)
        if self.hidden is not None:
            self.hidden[rows].addcmul_(gradient @ weight, coefficient)
        if self.bias is not None:
            self.bias[tokens].add_((gradient * coefficient).sum(dim=0))
        if self.weight is None:
            return
        scaled = (coefficient * hidden).to(gradient.dtype)
        total = self.weight[tokens]
        if self._rounded_off is not None:
            _add_exactly(total, self._rounded_off[tokens], gradient.t() @ scaled)
        elif gradient.dtype == total.dtype:
            total.addmm_(gradient.t(), scaled)
        else:
            total.add_(gradient.t() @ scaled)

    def add_labels(self, hidden: Tensor, labels: Tensor, label_logit: Tensor, token_weights: Tensor) -> None:
        """Add the part of all rows' labels."""
        coefficient = -token_weights * self._scale * self._head.settings.transform.cap_slope(label_logit)
        if self.hidden is not None:
            self.hidden.addcmul_(self._head.weight[labels], coefficient.unsqueeze(-1))
        if self.bias is not None:
            self.bias.index_add_(0, labels, coefficient.to(self.bias.dtype))
        if self.weight is not None:
            sums, owners = _sum_by_label(coefficient.unsqueeze(-1) * hidden, labels)
            self.weight.index_add_(0, owners, sums.to(self.weight.dtype))

    def results(self, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias, each in its own type; None where not needed."""
        gradients = (self.hidden, self.weight, self.bias)
        return tuple(None if each is None else each.to(dtype) for each, dtype in zip(gradients, dtypes, strict=True))


def _add_exactly(total: Tensor, rounded_off: Tensor, summand: Tensor) -> None:
    """Add in float32 and keep what `total` cannot hold; on CPU in pieces that stay in cache."""
    size = len(total) if total.device.type == "cuda" else max(1, 2**18 // total.shape[1])
    for parts in zip(total.split(size), rounded_off.split(size), summand.split(size), strict=True):
        upper, lower, summand_part = parts
        exact = upper.float() + lower + summand_part
        upper.copy_(exact)
        lower.copy_(exact.sub_(upper))


def _sum_by_label(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the rows of equal labels in the rows' own precision: the sums, and the label that owns each.

    Frequent labels would lose digits if their rows were added to a half-precision gradient one by one. There are as
    many sums as rows, so that no size depends on the data; unused ones are zero and owned by label 0.
    """
    ordered, order = labels.sort()
    place = (ordered != ordered.roll(1)).long().cumsum(0)
    place = place - place[:1]
    owners = torch.zeros_like(labels).scatter_(0, place, ordered)
    return torch.zeros_like(rows).index_add_(0, place, rows[order]), owners


class _Scores(torch.autograd.Function):
    """Scores of all rows. With token weights the loss's gradient is computed in forward, else any in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        token_weights: Tensor | None,
        settings: ScoringSettings,
    ) -> tuple[Tensor | None, ...]:
        ctx.settings, ctx.loss_is_known, ctx.num_rows = settings, token_weights is not None, len(labels)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        head, converted = TiledHead(weight, bias, settings), hidden.to(settings.dtype)
        if token_weights is None:
            block = head.score_block(converted, labels)
            ctx.save_for_backward(hidden, weight, bias, labels, block.label_logit, block.top, block.log_sum)
            ctx.mark_non_differentiable(*(each for each in (block.entropy, block.is_top1) if each is not None))
            return None, block.log_probs, block.entropy, block.is_top1
        # float16 has no digits left for weights such as 1 / num_tokens: `backward` puts them on, scaled by a scaler.
        unit = token_weights.abs().sum() if settings.dtype == torch.float16 else None
        relative = token_weights if unit is None else token_weights / unit.clamp(min=1e-30) * len(labels)
        scores, gradients = _scores_and_gradients(_Needed(*ctx.needs_input_grad[:3]), converted, head, labels, relative)
        ctx.save_for_backward(unit, *gradients.results(ctx.dtypes))
        detached = (scores.log_probs, scores.token_entropy, scores.is_top1)
        ctx.mark_non_differentiable(*(each for each in detached if each is not None))
        return -(token_weights * scores.log_probs).sum(), *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.loss_is_known:
            unit, *gradients = ctx.saved_tensors
            factor = upstream[0] if unit is None else upstream[0] * unit / max(ctx.num_rows, 1)
            return *(_times(gradient, factor) for gradient in gradients), None, None, None
        hidden, weight, bias, labels, label_logit, top, log_sum = ctx.saved_tensors
        token_weights = -upstream[1]
        head, converted = TiledHead(weight, bias, ctx.settings), hidden.to(ctx.settings.dtype)
        collected = _Gradients(_Needed(*ctx.needs_input_grad[:3]), converted, head)
        for weight_tile, tile in head.score_tiles(converted, labels):
            probability = (tile.top - top + tile.log_sum - log_sum).exp()
            collected.add_tile(slice(None), weight_tile, converted, tile.gradient, probability * token_weights)
        collected.add_labels(converted, labels, label_logit, token_weights)
        return *collected.results(ctx.dtypes), None, None, None


def _scores_and_gradients(
    needed: _Needed, hidden: Tensor, head: TiledHead, labels: Tensor, token_weights: Tensor
) -> tuple[ResponseScores, _Gradients]:
    """Scores and the loss's gradients from the same tiles, some rows at a time."""
    size = head.settings.tiling.rows_per_block(head.weight.shape[0], head.settings.dtype)
    blocks: list[Block] = []
    gradients = _Gradients(needed, hidden, head, num_blocks=-(-len(hidden) // size))
    for start in range(0, max(len(hidden), 1), size):
        rows = slice(start, start + size)
        tile_gradients: deque[Tensor] | None = deque() if any(needed) else None
        blocks.append(block := head.score_block(hidden[rows], labels[rows], tile_gradients))
        if tile_gradients is None:
            continue
        for weight_tile, probability in zip(head.weight_tiles(), block.tile_probabilities, strict=True):
            coefficient = probability * token_weights[rows]
            gradients.add_tile(rows, weight_tile, hidden[rows], tile_gradients.popleft(), coefficient)
    gradients.add_labels(hidden, labels, torch.cat([block.label_logit for block in blocks]), token_weights)
    found = [block.is_top1 for block in blocks if block.is_top1 is not None]
    scores = ResponseScores(
        log_probs=torch.cat([block.log_probs for block in blocks]),
        token_entropy=torch.cat([block.entropy for block in blocks]),
        is_top1=torch.cat(found) if found else None,
    )
    return scores, gradients


def _times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """The product, if possible without a copy, which would be as large as the head.

    On CPU the factor is 1 as a rule, and the gradient is then returned as it is. On other devices finding that out
    would mean waiting for them, so the gradient is multiplied in place. Autograd then refuses a second backward pass,
    since a tensor that it needs has changed.
    """
    if gradient is None or (factor.device.type == "cpu" and factor.item() == 1.0):
        return gradient
    factor = factor.to(gradient.dtype)
    return gradient * factor if factor.device.type == "cpu" else gradient.mul_(factor)
