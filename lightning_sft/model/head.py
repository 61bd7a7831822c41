"""The language-model head without its logits: log-probabilities, entropies and gradients, tile by tile."""

from collections import deque
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sft.model.tiles import (
    Rule,
    cap_slope,
    float32_or_more,
    score_block,
    score_tiles,
    tile_shape,
    weight_tiles,
)


@dataclass(frozen=True)
class Head:
    """How logits follow from hidden states: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Attributes:
        weight: `(vocab_size, hidden_size)`.
        bias: `(vocab_size,)`, if there is one.
        scale: Multiplies the logits (Cohere, Granite).
        softcap: Bounds the logits (Gemma 2); None: it does not.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def score_labels(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    return_is_top1: bool = False,
) -> dict[str, Tensor]:
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
        return_is_top1: Also return `is_top1`, whether the label is the first token with the highest logit.

    Returns:
        `log_probs` (detached if there is a `loss`), `token_entropy` and `is_top1` (always detached), `(num_tokens,)`;
        and the scalar `loss`.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rule = Rule(head.scale, head.softcap, dtype, return_is_top1)
    with torch.autocast(device, enabled=False):
        loss, *scores = _Scores.apply(hidden, head.weight, head.bias, labels, token_weights, rule)
    names = ("log_probs", "token_entropy", "is_top1")
    result = {name: score for name, score in zip(names, scores, strict=True) if score is not None}
    return result if loss is None else {"loss": loss, **result}


class _Gradients:
    """The gradients of `sum(token_weights * (log_sum - label_logit))`, gathered tile by tile.

    Rows differ by a coefficient only, which is put on the hidden states rather than on the vocabulary. A matrix
    product sums in float32 whatever its type, but half-precision products of many blocks, added in half precision,
    would lose what is small beside their sum. What each addition rounds off is therefore kept and added to the next:
    as exact as a float32 sum, in half its memory.
    """

    def __init__(
        self,
        needed: tuple[bool, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rule: Rule,
        num_blocks: int = 1,
    ) -> None:
        self._rule, self._head_weight = rule, weight
        precise = float32_or_more(hidden[:0]).dtype
        self.hidden = torch.zeros_like(hidden, dtype=precise) if needed[0] else None
        self.weight = torch.zeros_like(weight) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=precise) if bias is not None and needed[2] else None
        rounds = needed[1] and weight.dtype.itemsize < 4 and num_blocks > 1
        self._rounded_off = torch.zeros_like(weight) if rounds else None

    def add_tile(
        self, rows: slice, where: slice, hidden: Tensor, weight_tile: Tensor, slope: Tensor, share: Tensor
    ) -> None:
        """Add some rows' part on a tile; `share` is the tile's share times the token weights, `(rows,)`."""
        coefficient = (share * self._rule.scale).unsqueeze(-1)
        if self.hidden is not None:
            self.hidden[rows].addcmul_(slope @ weight_tile, coefficient)
        if self.bias is not None:
            self.bias[where].add_((slope * coefficient).sum(dim=0))
        if self.weight is None:
            return
        scaled = (coefficient * hidden).to(slope.dtype)
        total = self.weight[where]
        if self._rounded_off is not None:
            _add_exactly(total, self._rounded_off[where], slope.t() @ scaled)
        elif slope.dtype == total.dtype:
            total.addmm_(slope.t(), scaled)
        else:
            total.add_(slope.t() @ scaled)

    def add_labels(self, hidden: Tensor, labels: Tensor, label_logit: Tensor, token_weights: Tensor) -> None:
        """Add the part of all rows' labels."""
        coefficient = -token_weights * self._rule.scale * cap_slope(label_logit, self._rule)
        if self.hidden is not None:
            self.hidden.addcmul_(self._head_weight[labels], coefficient.unsqueeze(-1))
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


def kept_rows(weight: Tensor, rule: Rule, device_type: str) -> int:
    """Rows whose tiles the loss keeps at a time: on CPU some 128 MiB of them, on CUDA 2.5 GiB."""
    kept = (5 * 2**29 if device_type == "cuda" else 2**27) // (weight.shape[0] * rule.dtype.itemsize)
    step = min(256, tile_shape(device_type)[0])
    return -(-kept // step) * step


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
        rule: Rule,
    ) -> tuple[Tensor | None, ...]:
        ctx.rule, ctx.known, ctx.num_rows = rule, token_weights is not None, len(labels)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        inputs = (hidden.to(rule.dtype), weight, bias)
        if token_weights is None:
            block = score_block(*inputs, labels, rule)
            ctx.save_for_backward(hidden, weight, bias, labels, block.label_logit, block.top, block.log_sum)
            ctx.mark_non_differentiable(*(score for score in block.scores[1:] if score is not None))
            return None, *block.scores
        # float16 has no digits left for weights such as 1 / num_tokens: `backward` puts them on, scaled by a scaler.
        unit = token_weights.abs().sum() if rule.dtype == torch.float16 else None
        relative = token_weights if unit is None else token_weights / unit.clamp(min=1e-30) * len(labels)
        scores, gradients = _scores_and_gradients(ctx.needs_input_grad[:3], *inputs, labels, relative, rule)
        ctx.save_for_backward(unit, *gradients.results(ctx.dtypes))
        ctx.mark_non_differentiable(*(score for score in scores if score is not None))
        return -(token_weights * cast(Tensor, scores[0])).sum(), *scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known:
            unit, *gradients = ctx.saved_tensors
            factor = upstream[0] if unit is None else upstream[0] * unit / max(ctx.num_rows, 1)
            return *(_times(gradient, factor) for gradient in gradients), None, None, None
        hidden, weight, bias, labels, label_logit, top, log_sum = ctx.saved_tensors
        token_weights = -upstream[1]
        inputs = (hidden.to(ctx.rule.dtype), weight, bias)
        collected = _Gradients(ctx.needs_input_grad[:3], *inputs, ctx.rule)
        for where, weight_tile, tile in score_tiles(*inputs, labels, ctx.rule):
            share = (tile.top - top + tile.log_sum - log_sum).exp() * token_weights
            collected.add_tile(slice(None), where, inputs[0], weight_tile, tile.slope, share)
        collected.add_labels(inputs[0], labels, label_logit, token_weights)
        return *collected.results(ctx.dtypes), None, None, None


def _scores_and_gradients(
    needed: tuple[bool, ...],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    rule: Rule,
) -> tuple[tuple[Tensor | None, ...], _Gradients]:
    """Scores and the loss's gradients from the same tiles, some rows at a time."""
    size = kept_rows(weight, rule, weight.device.type)
    blocks = []
    gradients = _Gradients(needed, hidden, weight, bias, rule, num_blocks=-(-len(hidden) // size))
    for start in range(0, max(len(hidden), 1), size):
        rows = slice(start, start + size)
        slopes: deque[Tensor] | None = deque() if any(needed) else None
        blocks.append(block := score_block(hidden[rows], weight, bias, labels[rows], rule, slopes))
        if slopes is None:
            continue
        for (where, weight_tile), share in zip(weight_tiles(weight, rule), block.shares, strict=True):
            gradients.add_tile(rows, where, hidden[rows], weight_tile, slopes.popleft(), share * token_weights[rows])
    label_logit = torch.cat([block.label_logit for block in blocks])
    gradients.add_labels(hidden, labels, label_logit, token_weights)
    columns = zip(*(block.scores for block in blocks), strict=True)
    return tuple(None if column[0] is None else torch.cat(column) for column in columns), gradients


def _times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """The product, without a copy of the vocabulary's size where that is to be had.

    On the CPU the factor is 1 as a rule. Reading it off a device would mean waiting, so there the gradient itself is
    multiplied; a second backward would be refused by autograd, as a tensor it needs was changed in place.
    """
    if gradient is None or (factor.device.type == "cpu" and factor.item() == 1.0):
        return gradient
    factor = factor.to(gradient.dtype)
    return gradient * factor if factor.device.type == "cpu" else gradient.mul_(factor)
