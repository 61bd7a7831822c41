"""Scores of labels from tiles of logits: some rows times part of the vocabulary, small enough for a cache.

No more than a tile's logits exist at a time. Within a tile everything is relative to each row's largest logit there.
The tiles of a row are put together by the grouping property of the entropy, `H = H(p) + sum_t p_t H_t`, where `p_t` is
the probability of all tokens of tile `t`: no digits cancel in it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sft.model.fused import fused
from lightning_sft.model.token_loss import NLL, TokenLoss


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's products: `logits = softcap * tanh(scale * products / softcap)`.

    Attributes:
        scale: Multiplies the products (Cohere, Granite).
        softcap: Bound of the logits (Gemma 2). None: there is none, and `logits = scale * products`.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, products: Tensor) -> Tensor:
        """The logits, of the shape of the products."""
        logits = products if self.scale == 1.0 else products * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def cap_slope(self, logits: Tensor) -> Tensor:
        """Derivative of each logit by the same logit before it was capped: 1 where there is no cap."""
        return torch.ones_like(logits) if self.softcap is None else 1 - (logits / self.softcap) ** 2


class Tile(NamedTuple):
    """Some rows on part of the vocabulary, `(rows,)` each; the gradient is `(rows, width)`."""

    log_sum: Tensor  # logsumexp of the logits less `top`
    entropy: Tensor  # of the distribution within the tile
    label_logit: Tensor  # zero where the label is in another tile
    top: Tensor  # the largest logit
    top_index: Tensor  # of the first token that has it, counted from the tile's start; meaningless unless asked for
    below_top: Tensor  # sum of the logits less `top` each; meaningless unless asked for
    gradient: Tensor  # of `log_sum` with respect to the logits before the cap: softmax times its slope


TileFunction = Callable[[Tensor, Tensor | None, Tensor, LogitTransform, torch.dtype, bool, bool], Tile]


def score_tile(
    products: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    gradient_dtype: torch.dtype,
    return_is_top1: bool,
    sums_logits: bool = False,
) -> Tile:
    """Score a tile.

    Args:
        products: Of hidden states and the tile's weights, `(rows, width)`.
        bias: Of the tile's tokens, `(width,)`, if there is one.
        labels: Counted from the tile's start, `(rows,)`; those of other tiles are below 0 or at least `width`.
        transform: Makes logits of products and bias.
        gradient_dtype: Type of the gradient, which matrices are then multiplied in.
        return_is_top1: Whether to find out which token has the largest logit.
        sums_logits: Whether to sum the logits.
    """
    logits = float32_or_more(products)
    if bias is not None:
        logits = logits + bias
    logits = transform.apply(logits)
    if return_is_top1:
        top, top_index = logits.max(dim=-1)
    else:
        top = logits.amax(dim=-1)
        top_index = labels
    inside = (labels >= 0) & (labels < logits.shape[-1])
    label_logit = logits.gather(-1, labels.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    below_top = logits - top.unsqueeze(-1)
    softmax = torch.softmax(below_top, dim=-1)
    log_sum = -softmax.amax(dim=-1).log()  # the largest probability is exp(0) / sum
    gradient = softmax if transform.softcap is None else softmax * transform.cap_slope(logits)
    sum_below_top = below_top.sum(dim=-1) if sums_logits else log_sum
    return Tile(
        log_sum=log_sum,
        entropy=log_sum - below_top.mul_(softmax).sum(dim=-1),
        label_logit=torch.where(inside, label_logit, 0.0),
        top=top,
        top_index=top_index,
        below_top=sum_below_top,
        gradient=gradient.to(gradient_dtype),
    )


def float32_or_more(tensor: Tensor) -> Tensor:
    """In float64 if it is so already, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class Tiling:
    """How the logits are divided into tiles.

    Attributes:
        rows: Rows of a tile.
        width: Tokens of the vocabulary in a tile, at the most.
        block_bytes: Memory for the gradients of tiles that the loss keeps until it knows how probable each tile is.
        score: Scores a tile, as `score_tile` does.
    """

    rows: int
    width: int
    block_bytes: int
    score: TileFunction

    @classmethod
    def for_device(cls, device_type: str, score: TileFunction | None = None) -> "Tiling":
        """The tiling that suits a device.

        On CPU a tile is 2 MiB of float32 and stays in the cache. On CUDA it is large enough to fill the device, and the
        elementwise operations on a tile are fused, unless there is another `score`.
        """
        if device_type == "cuda":
            return cls(rows=16384, width=20480, block_bytes=5 * 2**29, score=score or fused(score_tile))
        return cls(rows=256, width=2048, block_bytes=2**27, score=score or score_tile)

    def width_of_tiles(self, vocab_size: int) -> int:
        """Tokens of each tile but perhaps the last: all alike where possible, since there is code for each width."""
        fewest = -(-vocab_size // self.width)
        for number in range(fewest, 2 * fewest) if self.score is not score_tile else ():
            width, rest = divmod(vocab_size, number)
            if not rest and width % 8 == 0:  # numbers are then read several at a time
                return width
        return self.width

    def rows_per_block(self, vocab_size: int, dtype: torch.dtype) -> int:
        """Rows whose gradients on the whole vocabulary fit into `block_bytes`, rounded up to whole tiles."""
        fitting = self.block_bytes // (vocab_size * dtype.itemsize)
        step = min(256, self.rows)
        return -(-fitting // step) * step


class WeightTile(NamedTuple):
    """The head's weights of part of the vocabulary, `(width, hidden_size)`."""

    tokens: slice
    weight: Tensor


class Block(NamedTuple):
    """Some rows on the whole vocabulary, `(rows,)` each; the probabilities of the tiles are `(tiles, rows)`."""

    log_probs: Tensor  # of the labels
    mean_log_probs: Tensor | None  # over the vocabulary
    entropy: Tensor
    is_top1: Tensor | None
    label_logit: Tensor
    top: Tensor  # the largest logit
    log_sum: Tensor  # logsumexp of the logits less `top`
    tile_probabilities: Tensor


@dataclass(frozen=True)
class ScoringSettings:
    """What is the same for all tiles."""

    transform: LogitTransform
    dtype: torch.dtype  # in which matrices are multiplied
    return_is_top1: bool  # whether to find out if the label has the largest logit
    tiling: Tiling
    token_loss: TokenLoss = NLL


@dataclass(frozen=True)
class TiledHead:
    """A head whose logits are computed tile by tile."""

    weight: Tensor  # (vocab_size, hidden_size)
    bias: Tensor | None  # (vocab_size,)
    settings: ScoringSettings

    def weight_tiles(self) -> Iterator[WeightTile]:
        """The weights of one tile after another, in the type in which matrices are multiplied."""
        width = self.settings.tiling.width_of_tiles(self.weight.shape[0])
        for start in range(0, self.weight.shape[0], width):
            tokens = slice(start, start + width)
            yield WeightTile(tokens, self.weight[tokens].to(self.settings.dtype))

    def score_tiles(self, hidden: Tensor, labels: Tensor) -> Iterator[tuple[WeightTile, Tile]]:
        """Score all rows on one tile of the vocabulary after another."""
        settings, tiling = self.settings, self.settings.tiling
        smooths = settings.token_loss.label_smoothing > 0
        options = (settings.transform, settings.dtype, settings.return_is_top1, smooths)
        for weight_tile in self.weight_tiles():
            tokens, weight = weight_tile
            bias = None if self.bias is None else self.bias[tokens]
            parts = []
            for rows, row_labels in zip(hidden.split(tiling.rows), labels.split(tiling.rows), strict=True):
                score = tiling.score if len(rows) > 1 else score_tile  # a single row would be compiled for separately
                parts.append(score(rows @ weight.t(), bias, row_labels - tokens.start, *options))
            yield weight_tile, parts[0] if len(parts) == 1 else Tile(*map(torch.cat, zip(*parts, strict=True)))

    def score_block(self, hidden: Tensor, labels: Tensor, gradients: deque[Tensor] | None = None) -> Block:
        """Put the tiles of each row together; the tiles' gradients are appended to `gradients`."""
        found = []
        for weight_tile, tile in self.score_tiles(hidden, labels):
            found.append((*tile[:4], tile.top_index + weight_tile.tokens.start, tile.below_top))
            if gradients is not None:
                gradients.append(tile.gradient)
        log_sums, entropies, label_logits, tops, top_indices, below_tops = map(torch.stack, zip(*found, strict=True))
        top = tops.amax(dim=0)
        smooths = self.settings.token_loss.label_smoothing > 0
        mean_below_top = self._mean(below_tops, tops - top) if smooths else None
        log_sums = log_sums + (tops - top)
        log_sum = log_sums.logsumexp(dim=0)
        probabilities = (log_sums - log_sum).exp()
        label_logit = label_logits.sum(dim=0)
        is_top1 = None
        if self.settings.return_is_top1:
            is_top1 = top_indices.gather(0, tops.argmax(dim=0, keepdim=True)).squeeze(0) == labels
        return Block(
            log_probs=label_logit - top - log_sum,
            mean_log_probs=None if mean_below_top is None else mean_below_top - log_sum,
            entropy=(probabilities * (entropies + log_sum - log_sums)).sum(dim=0),
            is_top1=is_top1,
            label_logit=label_logit,
            top=top,
            log_sum=log_sum,
            tile_probabilities=probabilities,
        )

    def _mean(self, sums: Tensor, offsets: Tensor) -> Tensor:
        """Mean over the vocabulary, of sums over each tile and of what is still to be added to each number there."""
        vocab_size = self.weight.shape[0]
        width = self.settings.tiling.width_of_tiles(vocab_size)
        widths = [min(width, vocab_size - start) for start in range(0, vocab_size, width)]
        totals = [total + offset * width for total, offset, width in zip(sums, offsets, widths, strict=True)]
        return torch.stack(totals).sum(dim=0) / vocab_size
