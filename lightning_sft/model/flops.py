"""How many multiplications and additions training takes."""

from torch import nn
from transformers import PreTrainedModel


def training_flops(
    model: PreTrainedModel, num_tokens: int, num_response_tokens: int, num_attended: int
) -> float | None:
    """Multiplications and additions that training on some sequences takes, forward and backward.

    A matrix of `n` weights takes `2 n` for each token that goes through it, and as many for the gradient of its input.
    If it is trained, its own gradient takes as many again. A pair of tokens in attention takes `4 num_heads *
    head_size` in each layer, and twice that in backward.

    Args:
        model: A causal language model.
        num_tokens: Tokens that go through the body.
        num_response_tokens: Tokens that go through the head.
        num_attended: Pairs of a token and one that it attends to, itself included.

    Returns:
        The number, or None where this does not tell it: for a mixture of experts, where it depends on the routing, and
        for a model whose configuration names no attention heads, such as a state-space model.
    """
    config = model.config.get_text_config()
    has_experts = any("experts" in name for name, _ in model.named_parameters())
    if has_experts or not all(hasattr(config, name) for name in ("hidden_size", "num_attention_heads")):
        return None
    head: nn.Linear | None = model.get_output_embeddings()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    body = [
        weight
        for weight in model.parameters()
        if weight.ndim == 2 and id(weight) not in looked_up and (head is None or weight is not head.weight)
    ]
    flops = float(num_tokens * sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in body))
    if head is not None:
        flops += num_response_tokens * head.weight.numel() * (6 if head.weight.requires_grad else 4)
    head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_heads: int = config.num_hidden_layers * config.num_attention_heads
    return flops + 12.0 * num_heads * head_size * num_attended
