"""Gradients with respect to the logits of a tile, once the sums of whole rows are known."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sft.model.fused import fused
from lightning_sft.model.tiles import LogitTransform, TiledHead, WeightTile, float32_or_more, score_tile


@dataclass(frozen=True)
class LogitGradient:
    """The gradient of `sum(a * log_probs + b * entropies)` with respect to all logits, without the labels' own part.

    With `p` the probabilities of a row and `H` their entropy, a row's gradient is `-p * (a + b * (log p + H))`, and `a`
    more at its label. It is computed as `coefficient * p * (offset + slope * log p)`, with an offset and a slope of
    about 1, so that a tile keeps its digits in half precision; all are `(num_tokens,)`.

    Attributes:
        top: The largest logit of each row.
        log_sum: `logsumexp` of its logits less `top`.
        coefficient: Multiplies the row.
        offset: None: it is 1, and the slope 0, as where nothing depends on the entropies.
        slope: Likewise.
    """

    top: Tensor
    log_sum: Tensor
    coefficient: Tensor
    offset: Tensor | None = None
    slope: Tensor | None = None

    @classmethod
    def of(cls, top: Tensor, log_sum: Tensor, entropy: Tensor, a: Tensor, b: Tensor | None) -> "LogitGradient":
        """From the entropies and the upstream gradients of log-probabilities and, if there are any, of entropies."""
        if b is None:
            return cls(top, log_sum, -a)
        offset = a + b * entropy
        unit = (offset.abs() + b.abs()).clamp(min=1e-30)
        return cls(top, log_sum, -unit, offset / unit, b / unit)

    def tiles(self, head: TiledHead, hidden: Tensor) -> Iterator[tuple[WeightTile, Tensor]]:
        """The gradients of one tile of the vocabulary after another, `(num_tokens, width)`, without `coefficient`."""
        settings = head.settings
        # As for scores: the same tiles, and fused into one pass over each where that is faster.
        function = gradient_tile if settings.tiling.score is score_tile else fused(gradient_tile)
        for weight_tile in head.weight_tiles():
            tokens, weight = weight_tile
            bias = None if head.bias is None else head.bias[tokens]
            parts = []
            for start in range(0, max(len(hidden), 1), settings.tiling.rows):
                rows = slice(start, start + settings.tiling.rows)
                offset, slope = (None if each is None else each[rows] for each in (self.offset, self.slope))
                products = hidden[rows] @ weight.t()
                options = (bias, settings.transform, settings.dtype)
                parts.append(function(products, *options, self.top[rows], self.log_sum[rows], offset, slope))
            yield weight_tile, parts[0] if len(parts) == 1 else torch.cat(parts)


def gradient_tile(
    products: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    gradient_dtype: torch.dtype,
    top: Tensor,
    log_sum: Tensor,
    offset: Tensor | None,
    slope: Tensor | None,
) -> Tensor:
    """A tile's `p * (offset + slope * log p)` with respect to the logits before the soft cap, `(rows, width)`.

    The first four arguments are as for `score_tile`. The others are those of `LogitGradient`, of these rows.
    """
    logits = float32_or_more(products)
    if bias is not None:
        logits = logits + bias
    logits = transform.apply(logits)
    log_p = (logits - top.unsqueeze(-1)) - log_sum.unsqueeze(-1)
    gradient = log_p.exp()
    if offset is not None and slope is not None:
        gradient = gradient * (offset.unsqueeze(-1) + slope.unsqueeze(-1) * log_p)
    if transform.softcap is not None:
        gradient = gradient * transform.cap_slope(logits)
    return gradient.to(gradient_dtype)
