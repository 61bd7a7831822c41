"""Log-probabilities of labels and entropies of the next-token distribution, in nats."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.errors import SettingsError
from lightning_sft.model.head import ResponseScores, score_labels
from lightning_sft.model.linear_head import LinearHead, find_linear_head
from lightning_sft.model.routing import RoutingRecorder
from lightning_sft.model.tiles import LogitTransform, Tiling, float32_or_more
from lightning_sft.model.token_loss import NLL, TokenLoss


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution over the vocabulary.

    `H = -sum_v p_v log p_v` with `log p = logits - logsumexp(logits)`. `log_softmax` computes that after subtracting
    the maximum, so no digits cancel however large the logits are; a logit of `-inf` adds zero.

    Args:
        logits: Unnormalised scores, `(batch_size, sequence_length, vocab_size)`. Half precision is upcast once.

    Returns:
        Entropies in nats, `(batch_size, sequence_length)`, float32 (float64 for float64 logits).

    Source: Stanford CS336, assignment 5, "SFT helper methods".
    """
    log_p = torch.log_softmax(float32_or_more(logits), dim=-1)
    # exp(-1000) is 0 even in float64. Clamping to the dtype's minimum instead would overflow in backward.
    return -(log_p.exp() * log_p.clamp(min=-1000.0)).sum(dim=-1)


def get_response_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    return_token_entropy: bool = False,
    *,
    response_mask: Tensor | None = None,
    return_is_top1: bool = False,
    **model_kwargs: Any,
) -> dict[str, Tensor]:
    """Log-probability of each label under the model: `log softmax(model(input_ids).logits)[label]`.

    Without `response_mask` nothing is masked: prompt and padding positions are scored like all others. With it, only
    response positions go through the head, and the results elsewhere are zero (False). The logits are never stored,
    unless the model's head is not a linear layer: then the model computes them (see `score_responses`).

    Args:
        model: A Hugging Face causal language model, or any module whose output has `logits`.
        input_ids: `(batch_size, sequence_length)`.
        labels: `(batch_size, sequence_length)`, the tokens that follow `input_ids`.
        return_token_entropy: Also return `token_entropy`.
        response_mask: `(batch_size, sequence_length)`; 1 or True where the label is a response token.
        return_is_top1: Also return `is_top1`, whether the label is the most likely token.
        **model_kwargs: Further arguments of the model, for a packed batch `position_ids`, `cu_seq_lens_q` and so on.

    Returns:
        `log_probs` in nats, `(batch_size, sequence_length)`, float32 or float64; if asked for, `token_entropy` and
        `is_top1` of the same shape. The first two carry gradients; in the backward pass an entropy costs something
        only if the loss depends on it.

    Raises:
        SettingsError: If a label that is to be scored is negative, or none of the head's tokens; or the shapes differ.

    Source: Stanford CS336, assignment 5, "SFT helper methods".
    """
    mask = torch.ones_like(labels) if response_mask is None else response_mask
    for name, tensor in {"input_ids": input_ids, "response_mask": mask}.items():
        if tensor.shape != labels.shape:
            raise SettingsError(
                f"`{name}` is of shape {tuple(tensor.shape)}, expected that of `labels`, {tuple(labels.shape)}."
            )
    positions = (mask.reshape(-1) == 1).nonzero().squeeze(-1)
    _check_labels(labels.reshape(-1)[positions], find_linear_head(model))
    scores = score_responses(
        model,
        input_ids,
        labels,
        positions,
        return_is_top1=return_is_top1,
        entropy_has_gradient=return_token_entropy,
        **model_kwargs,
    )

    def spread(score: Tensor) -> Tensor:  # over the whole batch, with zeros at all other positions
        zeros = torch.zeros(labels.numel(), dtype=score.dtype, device=score.device)
        return zeros.index_copy(0, positions, score).view_as(labels)

    result = {"log_probs": spread(scores.log_probs)}
    if return_token_entropy:
        result["token_entropy"] = spread(scores.token_entropy)
    if scores.is_top1 is not None:
        result["is_top1"] = spread(scores.is_top1)
    return result


def _check_labels(labels: Tensor, head: LinearHead | None) -> None:
    """Refuse labels that the head would take for those of another tile, and score as if their logit were 0."""
    lowest, highest = map(int, labels.aminmax()) if len(labels) else (0, 0)
    if lowest < 0:
        raise SettingsError(
            "`labels` has a negative number, such as -100, where a token is to be scored. Give `response_mask`, which "
            "is False there."
        )
    if head is not None and highest >= head.num_tokens:
        raise SettingsError(
            f"`labels` has the token {highest}, but the model's head has only {head.num_tokens}, from 0 on. Use the "
            "model's own tokenizer, or call `model.resize_token_embeddings` first."
        )


def score_responses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    response_positions: Tensor,
    *,
    normalize_constant: float | None = None,
    token_loss: TokenLoss = NLL,
    return_is_top1: bool = False,
    entropy_has_gradient: bool = False,
    tiling: Tiling | None = None,
    transform: LogitTransform | None = None,
    **model_kwargs: Any,
) -> ResponseScores:
    """Log-probabilities and entropies of the response tokens alone, one after another; and their loss.

    The model runs as it is, but its head sees response positions only, tile by tile (`head.py`). Where the head is not
    a linear layer, perhaps scaled and soft-capped (`linear_head.py`), or soft-capped and labels are smoothed, the model
    computes the logits of all columns in which there is a response.

    Args:
        model: As for `get_response_log_probs`.
        input_ids: `(batch_size, sequence_length)`.
        labels: `(batch_size, sequence_length)`.
        response_positions: Where the response tokens are in `labels.flatten()`, `(num_response_tokens,)`.
        normalize_constant: Given, the result also has a `loss`, the sum of what each token adds, divided by this; and
            only the loss carries gradients. It is cheaper than a loss made of `log_probs`.
        token_loss: What each token adds to the loss. By default `-log_probs`.
        return_is_top1: Also return `is_top1`.
        entropy_has_gradient: Whether `token_entropy` carries gradients, too; not if there is a `normalize_constant`.
        tiling: How the logits are divided into tiles. Default: as suits the device.
        transform: What the model is known to do to the head's products. Default: it is found out, once for each model.
        **model_kwargs: Passed to the model as they are.
    """
    chosen = labels.flatten()[response_positions]
    head = find_linear_head(model, transform)
    if isinstance(model, PreTrainedModel):
        model_kwargs.setdefault("use_cache", False)  # with a cache `transformers` would not keep documents apart
    if head is None or (token_loss.label_smoothing and head.transform.softcap is not None):
        with RoutingRecorder(model) as recorder:
            logits = float32_or_more(_response_logits(model, input_ids, response_positions, **model_kwargs))
        scores = _scores_of_logits(logits, chosen, normalize_constant, token_loss, return_is_top1, entropy_has_gradient)
        return replace(scores, routing=recorder.routing)
    found: list[ResponseScores] = []

    def score(hidden: Tensor) -> Tensor:
        responses = hidden.flatten(0, 1).index_select(0, response_positions)
        weights = None
        if normalize_constant is not None:
            dtype = float32_or_more(responses[:0]).dtype
            weights = torch.full_like(chosen, 1 / normalize_constant, dtype=dtype)
        scores = score_labels(
            responses,
            head.as_it_is_now(),
            chosen,
            token_weights=weights,
            token_loss=token_loss,
            return_is_top1=return_is_top1,
            tiling=tiling,
        )
        found.append(scores)
        return hidden.new_zeros(*hidden.shape[:-1], 1)  # where there would be logits

    head.layer.forward = score  # type: ignore[method-assign, assignment]  # its call gathers weights that are sharded
    try:
        with RoutingRecorder(model) as recorder:
            model(input_ids=input_ids, **model_kwargs)
    finally:
        del head.layer.forward
    return replace(found[-1], routing=recorder.routing)


def _scores_of_logits(
    logits: Tensor,
    labels: Tensor,
    normalize_constant: float | None,
    token_loss: TokenLoss,
    return_is_top1: bool,
    entropy_has_gradient: bool,
) -> ResponseScores:
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    log_probs = chosen - torch.logsumexp(logits, dim=-1)
    with torch.set_grad_enabled(entropy_has_gradient and torch.is_grad_enabled()):
        entropy = compute_entropy(logits)
    is_top1 = logits.detach().argmax(dim=-1) == labels if return_is_top1 else None
    if normalize_constant is None:
        return ResponseScores(log_probs, entropy, is_top1)
    mean_log_probs = torch.log_softmax(logits, dim=-1).mean(dim=-1) if token_loss.label_smoothing else None
    loss = token_loss.of(log_probs, mean_log_probs).sum() / normalize_constant
    return ResponseScores(log_probs.detach(), entropy.detach(), is_top1, loss)


def _response_logits(model: nn.Module, input_ids: Tensor, response_positions: Tensor, **model_kwargs: Any) -> Tensor:
    """Logits at the response positions, `(num_response_tokens, vocab_size)`, from the model's own forward."""
    width = num_columns = input_ids.shape[1]
    rows, columns = response_positions // width, response_positions % width
    if "logits_to_keep" in inspect.signature(model.forward).parameters and len(columns):
        kept, columns = columns.unique(return_inverse=True)
        model_kwargs["logits_to_keep"], num_columns = kept, len(kept)
    logits: Tensor = model(input_ids, **model_kwargs).logits
    if logits.shape[1] != num_columns:
        raise SettingsError(
            f"The model gives {logits.shape[1]} columns of logits, expected {num_columns}, one for each token that is "
            "asked for. Where it puts tokens of its own before the others, as prompt tuning does, give a module that "
            "leaves their logits out."
        )
    return logits[rows, columns]
