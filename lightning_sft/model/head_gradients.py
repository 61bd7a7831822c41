"""Gradients of hidden states, weight and bias of a language-model head, gathered tile by tile."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sft.model.tiles import TiledHead, WeightTile, float32_or_more


class NeededGradients(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


class HeadGradients:
    """The gradients of `sum(token_weights * (log_sum - label_logit))`, gathered tile by tile.

    If labels are smoothed by a share `e`, `label_logit` is `(1 - e) * label_logit + e * mean(logits)`.

    Each row of a tile is multiplied by a coefficient of its own. For the weight's gradient it multiplies the hidden
    states instead, since they are smaller than the tile.

    A matrix product is summed in float32 whatever its type is. Adding the products of many blocks in half precision,
    however, would lose what is small beside their sum. What each addition rounds off is therefore kept and added the
    next time: as exact as a sum in float32, which would need twice as much memory beside the gradient.
    """

    def __init__(self, needed: NeededGradients, hidden: Tensor, head: TiledHead, num_blocks: int = 1) -> None:
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
        """Add the part of some rows, which have these hidden states, on a tile.

        `gradient` is that of the tile with respect to the logits before the cap, `(rows, width)`. `coefficient` is the
        probability of the tile times the token weights, `(rows,)`.
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
        elif total.is_cuda and total.dtype == torch.float32:  # the products of half precision are summed in it anyway
            torch.addmm(total, gradient.t(), scaled, out_dtype=total.dtype, out=total)
        else:
            total.add_(gradient.t() @ scaled)

    def add_labels(self, hidden: Tensor, labels: Tensor, label_logit: Tensor, token_weights: Tensor) -> None:
        """Add the part of all rows' labels."""
        smoothing = self._head.settings.token_loss.label_smoothing
        transform = self._head.settings.transform
        coefficient = -(1 - smoothing) * token_weights * self._scale * transform.cap_slope(label_logit)
        if self.hidden is not None:
            self.hidden.addcmul_(self._head.weight[labels], coefficient.unsqueeze(-1))
        if self.bias is not None:
            self.bias.index_add_(0, labels, coefficient.to(self.bias.dtype))
        if self.weight is not None:
            sums, owners = _sum_by_label(coefficient.unsqueeze(-1) * hidden, labels)
            self.weight.index_add_(0, owners, sums.to(self.weight.dtype))
        if smoothing:
            self._add_all_tokens(hidden, -smoothing * token_weights * self._scale / len(self._head.weight))

    def _add_all_tokens(self, hidden: Tensor, coefficient: Tensor) -> None:
        """Add the part of smoothed labels, the same for all tokens of the vocabulary: no tile is needed for it."""
        assert self._head.settings.transform.softcap is None, "each token would have a slope of its own"
        if self.hidden is not None:
            sums = self._head.weight.sum(dim=0, dtype=self.hidden.dtype)
            self.hidden.addcmul_(coefficient.unsqueeze(-1), sums)
        if self.bias is not None:
            self.bias.add_(coefficient.sum())
        if self.weight is not None:
            self.weight.add_((coefficient.unsqueeze(-1) * hidden).sum(dim=0).to(self.weight.dtype))

    def results(self, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias, each in its own type; None where not needed."""
        gradients = (self.hidden, self.weight, self.bias)
        return tuple(None if each is None else each.to(dtype) for each, dtype in zip(gradients, dtypes, strict=True))


def _add_exactly(total: Tensor, rounded_off: Tensor, summand: Tensor) -> None:
    """Add in float32, and keep what `total` rounds off; on CPU in pieces that stay in the cache."""
    size = len(total) if total.device.type == "cuda" else max(1, 2**18 // total.shape[1])
    for parts in zip(total.split(size), rounded_off.split(size), summand.split(size), strict=True):
        upper, lower, summand_part = parts
        exact = upper.float() + lower + summand_part
        upper.copy_(exact)
        lower.copy_(exact.sub_(upper))


def _sum_by_label(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the rows of equal labels in the rows' own precision.

    Frequent labels would lose digits if their rows were added to a half-precision gradient one by one.

    Returns:
        The sums and the label that each belongs to. There are as many sums as rows, so that no size depends on the
        data; those that are left over are zero and belong to label 0.
    """
    ordered, order = labels.sort()
    place = (ordered != ordered.roll(1)).long().cumsum(0)
    place = place - place[:1]
    owners = torch.zeros_like(labels).scatter_(0, place, ordered)
    return torch.zeros_like(rows).index_add_(0, place, rows[order]), owners


def times(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """The product, if possible without a copy, which would be as large as the head.

    On CPU the factor is 1 as a rule, and the gradient is then returned as it is. On other devices finding that out
    would mean waiting for them, so the gradient is multiplied in place. Autograd then refuses a second backward pass,
    since a tensor that it needs has changed.
    """
    if gradient is None or (factor.device.type == "cpu" and factor.item() == 1.0):
        return gradient
    factor = factor.to(gradient.dtype)
    return gradient * factor if factor.device.type == "cpu" else gradient.mul_(factor)
