"""Log-probabilities of labels and entropies of the next-token distribution, in nats."""

from typing import Any

import torch
from torch import Tensor, nn


def _float32_or_more(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


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
    log_p = torch.log_softmax(_float32_or_more(logits), dim=-1)
    # exp(-1000) is 0 even in float64. Clamping to the dtype's minimum instead would overflow in backward.
    return -(log_p.exp() * log_p.clamp(min=-1000.0)).sum(dim=-1)


def get_response_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    return_token_entropy: bool = False,
    *,
    return_is_top1: bool = False,
    **model_kwargs: Any,
) -> dict[str, Tensor]:
    """Log-probability of each label under the model: `log softmax(model(input_ids).logits)[label]`.

    Nothing is masked here: prompt and padding positions are scored like all others.

    Args:
        model: A Hugging Face causal language model, or any module whose output has `logits`.
        input_ids: `(batch_size, sequence_length)`.
        labels: `(batch_size, sequence_length)`, the tokens that follow `input_ids`.
        return_token_entropy: Also return `token_entropy`.
        return_is_top1: Also return `is_top1`, whether the label is the model's first choice.
        **model_kwargs: Passed to the model as they are.

    Returns:
        `log_probs` in nats, `(batch_size, sequence_length)`, float32 or float64, carrying gradients. If asked for,
        `token_entropy` and `is_top1` of the same shape, both detached: they are metrics, and a graph through the
        entropy would keep a second tensor over the whole vocabulary alive until backward.

    Source: Stanford CS336, assignment 5, "SFT helper methods".
    """
    logits = _float32_or_more(model(input_ids, **model_kwargs).logits)
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    result = {"log_probs": chosen - torch.logsumexp(logits, dim=-1)}
    with torch.no_grad():
        if return_token_entropy:
            result["token_entropy"] = compute_entropy(logits)
        if return_is_top1:
            result["is_top1"] = logits.argmax(dim=-1) == labels
    return result
