"""What small tiles of logits say, without the logits: some rows times some of the vocabulary, small enough for a cache.

Within a tile everything is relative to each row's largest logit there. The tiles of a row are put together by the
grouping property of the entropy, `H = H(share) + sum_t share_t H_t`, with `share_t` the probability of all of tile `t`:
no digits cancel in it.
"""

import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """What does not change from tile to tile."""

    scale: float
    softcap: float | None
    dtype: torch.dtype  # that matrices are multiplied in
    return_is_top1: bool


class Tile(NamedTuple):
    """Some rows on one tile of the vocabulary, `(rows,)` each; `slope` is `(rows, tile)`."""

    log_sum: Tensor  # logsumexp of the logits, above `top`
    entropy: Tensor  # of the distribution within the tile
    label_logit: Tensor  # zero where the label is in another tile
    top: Tensor
    top_index: Tensor  # the first of equals; of no use unless asked for
    slope: Tensor  # of `log_sum`, by the capped logits' arguments: the softmax, times the slope of the cap


def score_tile(products: Tensor, bias: Tensor | None, labels: Tensor, rule: Rule) -> Tile:
    """Everything from one tile of `hidden @ weight.T`; `labels` count from the tile's start."""
    logits = float32_or_more(products)
    if bias is not None:
        logits = logits + bias
    if rule.scale != 1.0:
        logits = logits * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    if rule.return_is_top1:
        top, top_index = logits.max(dim=-1)
    else:
        top = logits.amax(dim=-1)
        top_index = labels
    inside = (labels >= 0) & (labels < logits.shape[-1])
    label_logit = logits.gather(-1, labels.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    below_top = logits - top.unsqueeze(-1)
    share = torch.softmax(below_top, dim=-1)
    log_sum = -share.amax(dim=-1).log()  # the largest share is exp(0) / sum
    slope = share if rule.softcap is None else share * cap_slope(logits, rule)
    return Tile(
        log_sum=log_sum,
        entropy=log_sum - below_top.mul_(share).sum(dim=-1),
        label_logit=torch.where(inside, label_logit, 0.0),
        top=top,
        top_index=top_index,
        slope=slope.to(rule.dtype),
    )


def cap_slope(logits: Tensor, rule: Rule) -> Tensor:
    return torch.ones_like(logits) if rule.softcap is None else 1 - (logits / rule.softcap) ** 2


def float32_or_more(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@cache
def tile_function(device_type: str) -> Callable[..., Tile]:
    """On CUDA a tile's elementwise passes are fused into one; on CPU they stay in cache."""
    if device_type != "cuda":
        return score_tile
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        warnings.warn("There is no C compiler, which `torch.compile` needs: the head takes longer.", stacklevel=2)
        return score_tile
    return torch.compile(score_tile, dynamic=True)


def tile_shape(device_type: str) -> tuple[int, int]:
    """Rows and vocabulary. On CPU 2 MiB of float32; on CUDA large enough to fill the device."""
    return (16384, 16384) if device_type == "cuda" else (256, 2048)


def weight_tiles(weight: Tensor, rule: Rule) -> Iterator[tuple[slice, Tensor]]:
    _, width = tile_shape(weight.device.type)
    for start in range(0, weight.shape[0], width):
        where = slice(start, start + width)
        yield where, weight[where].to(rule.dtype)


def score_tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rule: Rule
) -> Iterator[tuple[slice, Tensor, Tile]]:
    """All rows on each tile of the vocabulary in turn: where it is, its weight, what it says."""
    num_rows, _ = tile_shape(hidden.device.type)
    score = tile_function(hidden.device.type)
    for where, weight_tile in weight_tiles(weight, rule):
        bias_tile = None if bias is None else bias[where]
        parts = [
            (score if len(rows) > 1 else score_tile)(rows @ weight_tile.t(), bias_tile, row_labels - where.start, rule)
            for rows, row_labels in zip(hidden.split(num_rows), labels.split(num_rows), strict=True)
        ]
        yield where, weight_tile, parts[0] if len(parts) == 1 else Tile(*map(torch.cat, zip(*parts, strict=True)))


class Block(NamedTuple):
    """Some rows on the whole vocabulary, `(rows,)` each; `shares` is `(tiles, rows)`."""

    scores: tuple[Tensor, Tensor, Tensor | None]  # log-probability, entropy, is_top1
    label_logit: Tensor
    top: Tensor
    log_sum: Tensor  # above `top`
    shares: Tensor


def score_block(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rule: Rule,
    slopes: deque[Tensor] | None = None,
) -> Block:
    """Put the tiles of each row together; their slopes are appended to `slopes`."""
    columns: tuple[list[Tensor], ...] = ([], [], [], [], [])
    for where, _, tile in score_tiles(hidden, weight, bias, labels, rule):
        for column, value in zip(columns, (*tile[:4], tile.top_index + where.start), strict=True):
            column.append(value)
        if slopes is not None:
            slopes.append(tile.slope)
    log_sums, entropies, label_logits, tops, top_indices = map(torch.stack, columns)
    top = tops.amax(dim=0)
    log_sums = log_sums + (tops - top)
    log_sum = log_sums.logsumexp(dim=0)
    shares = (log_sums - log_sum).exp()
    entropy = (shares * (entropies + log_sum - log_sums)).sum(dim=0)
    label_logit = label_logits.sum(dim=0)
    is_top1 = None
    if rule.return_is_top1:
        is_top1 = top_indices.gather(0, tops.argmax(dim=0, keepdim=True)).squeeze(0) == labels
    return Block((label_logit - top - log_sum, entropy, is_top1), label_logit, top, log_sum, shares)
