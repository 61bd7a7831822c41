"""The language-model head without its logits: log-probabilities, entropies and gradients, tile by tile.

`torch.nn.functional.linear_cross_entropy` has neither entropies nor a scale nor a cap, and was slower on CPU.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_sft.model.head_gradients import HeadGradients, NeededGradients, times
from lightning_sft.model.routing import Routing
from lightning_sft.model.tile_gradients import LogitGradient
from lightning_sft.model.tiles import Block, LogitTransform, ScoringSettings, TiledHead, Tiling
from lightning_sft.model.token_loss import NLL, TokenLoss


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
        token_entropy: Entropy of the distribution that the label is from, in nats, `(num_tokens,)`. Detached if there
            is a `loss`.
        is_top1: Whether the label is the first token with the highest logit, `(num_tokens,)`, if that was asked for.
        loss: A weighted sum of what each token adds to the loss, a scalar, if that was asked for.
        routing: The routers' logits of a mixture of experts, if its configuration asks for a router loss.
    """

    log_probs: Tensor
    token_entropy: Tensor
    is_top1: Tensor | None = None
    loss: Tensor | None = None
    routing: Routing | None = None


def score_labels(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    token_loss: TokenLoss = NLL,
    return_is_top1: bool = False,
    tiling: Tiling | None = None,
) -> ResponseScores:
    """Log-probability of each label and entropy of its distribution, without keeping logits.

    Equals `log_softmax(logits)[labels]` and `compute_entropy(logits)`, gradients included. Matrices are multiplied in
    autocast's type, or else the hidden states'; everything else is float32 (float64 for float64). Memory does not grow
    with `num_tokens * vocab_size`.

    Args:
        hidden: What the head is applied to, `(num_tokens, hidden_size)`.
        head: The head.
        labels: `(num_tokens,)`.
        token_weights: `(num_tokens,)`. Given, the result also has `loss`, the sum of `token_weights` times what each
            token adds (`token_loss`). Its gradient is computed on the way: three matrix products instead of the four
            that an unknown gradient of the log-probabilities needs, since no logits have to be computed again.
        token_loss: By default `-log_probs`. Its factor costs nothing; smoothed labels, one more sum over each tile.
            They need logits without a cap.
        return_is_top1: Also return `is_top1`.
        tiling: How the logits are divided into tiles. Default: as suits the device.
    """
    device_type = hidden.device.type
    settings = ScoringSettings(
        transform=head.transform,
        dtype=torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype,
        return_is_top1=return_is_top1,
        tiling=tiling or Tiling.for_device(device_type),
        token_loss=NLL if token_weights is None else token_loss,
    )
    with torch.autocast(device_type, enabled=False):
        loss, log_probs, entropy, is_top1 = _Scores.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, labels, token_weights, settings
        )
    return ResponseScores(log_probs, entropy, is_top1, loss)


class _Scores(torch.autograd.Function):
    """Scores of labels, with gradients.

    With token weights the gradient of the loss is computed in `forward`, from the tiles that give the scores. Without
    them `backward` computes the tiles again and has the gradient for any use of log-probabilities and entropies.
    """

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
            sums = (block.label_logit, block.top, block.log_sum, block.entropy)
            ctx.save_for_backward(hidden, weight, bias, labels, *sums)
            ctx.set_materialize_grads(False)  # entropies that nothing depends on cost nothing in `backward`
            if block.is_top1 is not None:
                ctx.mark_non_differentiable(block.is_top1)
            return None, block.log_probs, block.entropy, block.is_top1
        # In float16 gradients weighted by 1 / num_tokens would vanish. They are computed with weights of about 1 here,
        # and `backward` multiplies them by the rest, which a loss scaler has made larger by then.
        unit = token_weights.abs().sum() if settings.dtype == torch.float16 else None
        relative = token_weights if unit is None else token_weights / unit.clamp(min=1e-30) * len(labels)
        needed = NeededGradients(*ctx.needs_input_grad[:3])
        scores, losses, gradients = _scores_and_gradients(needed, converted, head, labels, relative)
        ctx.save_for_backward(unit, *gradients.results(ctx.dtypes))
        detached = (scores.log_probs, scores.token_entropy, scores.is_top1)
        ctx.mark_non_differentiable(*(each for each in detached if each is not None))
        return (token_weights * losses).sum(), *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        if ctx.loss_is_known:
            unit, *gradients = ctx.saved_tensors
            factor = upstream[0] if unit is None else upstream[0] * unit / max(ctx.num_rows, 1)
            return *(times(gradient, factor) for gradient in gradients), None, None, None
        hidden, weight, bias, labels, label_logit, top, log_sum, entropy = ctx.saved_tensors
        of_log_probs = torch.zeros_like(entropy) if upstream[1] is None else upstream[1]
        gradient = LogitGradient.of(top, log_sum, entropy, of_log_probs, upstream[2])
        head, converted = TiledHead(weight, bias, ctx.settings), hidden.to(ctx.settings.dtype)
        collected = HeadGradients(NeededGradients(*ctx.needs_input_grad[:3]), converted, head)
        for weight_tile, tile in gradient.tiles(head, converted):
            collected.add_tile(slice(None), weight_tile, converted, tile, gradient.coefficient)
        collected.add_labels(converted, labels, label_logit, -of_log_probs)
        return *collected.results(ctx.dtypes), None, None, None


def _scores_and_gradients(
    needed: NeededGradients, hidden: Tensor, head: TiledHead, labels: Tensor, token_weights: Tensor
) -> tuple[ResponseScores, Tensor, HeadGradients]:
    """Scores, what each token adds to the loss, and the loss's gradients, all from the same tiles.

    The rows are gone through in blocks. A tile's gradients need the probability of the whole tile, which is known once
    all tiles of its rows are scored. Until then the gradients of the block's tiles are kept.
    """
    token_loss = head.settings.token_loss
    size = head.settings.tiling.rows_per_block(head.weight.shape[0], head.settings.dtype)
    blocks: list[Block] = []
    weights: list[Tensor] = []
    gradients = HeadGradients(needed, hidden, head, num_blocks=-(-len(hidden) // size))
    for start in range(0, max(len(hidden), 1), size):
        rows = slice(start, start + size)
        tile_gradients: deque[Tensor] | None = deque() if any(needed) else None
        blocks.append(block := head.score_block(hidden[rows], labels[rows], tile_gradients))
        factors = token_loss.factors(block.log_probs)
        weights.append(token_weights[rows] if factors is None else token_weights[rows] * factors)
        if tile_gradients is None:
            continue
        for weight_tile, probability in zip(head.weight_tiles(), block.tile_probabilities, strict=True):
            coefficient = probability * weights[-1]
            gradients.add_tile(rows, weight_tile, hidden[rows], tile_gradients.popleft(), coefficient)
    gradients.add_labels(hidden, labels, torch.cat([block.label_logit for block in blocks]), torch.cat(weights))
    found = [block.is_top1 for block in blocks if block.is_top1 is not None]
    scores = ResponseScores(
        log_probs=torch.cat([block.log_probs for block in blocks]),
        token_entropy=torch.cat([block.entropy for block in blocks]),
        is_top1=torch.cat(found) if found else None,
    )
    losses = torch.cat([token_loss.of(block.log_probs, block.mean_log_probs) for block in blocks])
    return scores, losses, gradients
