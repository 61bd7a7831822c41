"""Log-probabilities of labels and entropies of the next-token distribution, in nats."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.model.head import Head, score_labels
from lightning_sft.model.lora import trained_layer
from lightning_sft.model.tiles import float32_or_more


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

    Without `response_mask` nothing is masked: prompt and padding positions are scored like all others. With it only
    response positions go through the head, and all others are zero (False). The logits are never kept; a model whose
    head cannot be taken apart is asked for its logits instead (see `score_responses`).

    Args:
        model: A Hugging Face causal language model, or any module whose output has `logits`.
        input_ids: `(batch_size, sequence_length)`.
        labels: `(batch_size, sequence_length)`, the tokens that follow `input_ids`.
        return_token_entropy: Also return `token_entropy`.
        response_mask: `(batch_size, sequence_length)`; 1 or True where the label is a response token.
        return_is_top1: Also return `is_top1`, whether the label is the model's first choice.
        **model_kwargs: Passed to the model as they are: for a packed batch `position_ids`, `cu_seq_lens_q` and so on.

    Returns:
        `log_probs` in nats, `(batch_size, sequence_length)`, float32 or float64, carrying gradients. If asked for,
        `token_entropy` and `is_top1` of the same shape, both detached: they are metrics.

    Source: Stanford CS336, assignment 5, "SFT helper methods".
    """
    mask = torch.ones_like(labels) if response_mask is None else response_mask
    positions = (mask.reshape(-1) == 1).nonzero().squeeze(-1)
    scores = score_responses(model, input_ids, labels, positions, return_is_top1=return_is_top1, **model_kwargs)
    if not return_token_entropy:
        del scores["token_entropy"]
    return {
        name: torch.zeros(labels.numel(), dtype=score.dtype, device=score.device)
        .index_copy(0, positions, score)
        .view_as(labels)
        for name, score in scores.items()
    }


def score_responses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    response_positions: Tensor,
    *,
    normalize_constant: float | None = None,
    return_is_top1: bool = False,
    **model_kwargs: Any,
) -> dict[str, Tensor]:
    """Log-probabilities and entropies of the response tokens alone, one after another; and their loss.

    The model runs as it is, but its head sees response positions only, tile by tile (`head.py`). That its head is a
    linear layer, perhaps scaled and soft-capped, is tried out once for each model. Where it is not, the model computes
    the logits of all columns in which there is a response.

    Args:
        model: As for `get_response_log_probs`.
        input_ids: `(batch_size, sequence_length)`.
        labels: `(batch_size, sequence_length)`.
        response_positions: Where the response tokens are in `labels.flatten()`, `(num_response_tokens,)`.
        normalize_constant: Given, the result also has `loss = -sum(log_probs) / normalize_constant`, a scalar, and
            only the loss carries gradients. It is cheaper than a loss made of `log_probs`.
        return_is_top1: Also return `is_top1`.
        **model_kwargs: Passed to the model as they are.

    Returns:
        `log_probs`, `token_entropy` and `is_top1`, `(num_response_tokens,)`; and `loss`.
    """
    chosen = labels.flatten()[response_positions]
    head = _head_of(model)
    if isinstance(model, PreTrainedModel):
        model_kwargs.setdefault("use_cache", False)  # with a cache `transformers` would not keep documents apart
    if head is None:
        logits = float32_or_more(_response_logits(model, input_ids, response_positions, **model_kwargs))
        return _scores_of_logits(logits, chosen, normalize_constant, return_is_top1)
    scores: dict[str, Tensor] = {}

    def score(hidden: Tensor) -> Tensor:
        hidden = hidden.flatten(0, 1).index_select(0, response_positions)
        weights = None
        if normalize_constant is not None:
            precise = float32_or_more(hidden[:0]).dtype
            weights = torch.full(chosen.shape, 1 / normalize_constant, dtype=precise, device=chosen.device)
        found = Head(head.layer.weight, head.layer.bias, head.scale, head.softcap)
        scores.update(score_labels(hidden, found, chosen, token_weights=weights, return_is_top1=return_is_top1))
        return hidden.new_zeros(*input_ids.shape, 1)  # where there would be logits

    with _in_place_of(head.layer, score):
        model(input_ids=input_ids, **model_kwargs)
    return scores


@contextmanager
def _in_place_of(layer: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the layer's call run this function: inside the model's own, so that sharded weights are there."""
    layer.forward = function
    try:
        yield
    finally:
        del layer.forward


def _scores_of_logits(
    logits: Tensor, labels: Tensor, normalize_constant: float | None, return_is_top1: bool
) -> dict[str, Tensor]:
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    scores = {"log_probs": chosen - torch.logsumexp(logits, dim=-1)}
    if normalize_constant is not None:
        scores["loss"] = -scores["log_probs"].sum() / normalize_constant
        scores["log_probs"] = scores["log_probs"].detach()
    with torch.no_grad():
        scores["token_entropy"] = compute_entropy(logits)
        if return_is_top1:
            scores["is_top1"] = logits.argmax(dim=-1) == labels
    return scores


def _response_logits(model: nn.Module, input_ids: Tensor, response_positions: Tensor, **model_kwargs: Any) -> Tensor:
    """Logits at the response positions, `(num_response_tokens, vocab_size)`, from the model's own forward."""
    width = input_ids.shape[1]
    rows, columns = response_positions // width, response_positions % width
    if "logits_to_keep" in inspect.signature(model.forward).parameters and len(columns):
        kept, columns = columns.unique(return_inverse=True)
        model_kwargs["logits_to_keep"] = kept
    return model(input_ids, **model_kwargs).logits[rows, columns]


class _FoundHead(NamedTuple):
    layer: nn.Linear
    scale: float
    softcap: float | None


_HEAD_RULES: WeakKeyDictionary[nn.Module, tuple[float, float | None] | None] = WeakKeyDictionary()


def _head_of(model: nn.Module) -> _FoundHead | None:
    """The model's head, if what comes after it is known to be a scale and a cap and no more."""
    if not isinstance(model, PreTrainedModel):
        return None
    layer = trained_layer(model.get_output_embeddings())
    replaced = "forward" in vars(layer) or type(layer).forward is not nn.Linear.forward
    if not isinstance(layer, nn.Linear) or replaced or model.base_model is model:
        return None
    if model not in _HEAD_RULES:
        _HEAD_RULES[model] = _find_rule(model, layer)
    rule = _HEAD_RULES[model]
    return None if rule is None else _FoundHead(layer, *rule)


def _find_rule(model: PreTrainedModel, layer: nn.Linear) -> tuple[float, float | None] | None:
    """Scale and softcap, read off the configuration and tried out: made-up logits go into the model's last lines."""
    scale, softcap = _read_rule(model)
    device = model.device
    seen: list[Tensor] = []

    def made_up(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(torch.linspace(-100, 100, output.numel(), device=output.device).view_as(output).to(output))
        return seen[-1]

    hook = layer.register_forward_hook(made_up)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            logits = model(torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False).logits
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].shape[:-1] != (1, 2):
        return None
    expected = seen[0].double() * scale
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    tolerance = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    return (scale, softcap) if torch.allclose(logits.double(), expected, rtol=tolerance) else None


def _read_rule(model: PreTrainedModel) -> tuple[float, float | None]:
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return float(scale), getattr(config, "final_logit_softcapping", None)


def trust_head(model: PreTrainedModel) -> None:
    """Believe what the configuration says of the head, where it cannot be tried out: a model without values."""
    _HEAD_RULES[model] = _read_rule(model)
