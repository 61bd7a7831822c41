"""How a mixture of experts has distributed its tokens, and the router loss, which keeps experts equally busy.

Over the tokens of all layers `f_e` is how often expert `e` is chosen for a token, and `p_e` its mean probability; the
loss is `coefficient * num_experts * sum_e f_e p_e` (Switch Transformers, https://huggingface.co/papers/2101.03961).
It is a product of means, of which `f` has no gradient: with the `f` of a whole optimizer step each microbatch adds its
own part of the gradient.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

_FUNCTION = "load_balancing_loss_func"  # what models of `transformers` compute it with


@dataclass(frozen=True)
class Routing:
    """The routers' logits in one forward pass.

    Attributes:
        logits: Of each layer, `(num_tokens, num_experts)`, padding included.
        num_experts: Experts of a layer.
        top_k: Experts of a token.
    """

    logits: tuple[Tensor, ...]
    num_experts: int
    top_k: int

    def sums(self, counts: Tensor) -> "RoutingSums":
        """Add up over the tokens that count: `counts` says which, `(num_tokens,)`."""
        weights = counts.to(torch.float32)  # as all sums, also where Lightning makes another type the default
        chosen = torch.zeros(self.num_experts, dtype=torch.float32, device=counts.device)
        probability = torch.zeros_like(chosen)
        for logits in self.logits:
            probabilities = torch.softmax(logits.reshape(-1, self.num_experts), dim=-1)
            experts = torch.topk(probabilities, self.top_k, dim=-1).indices
            chosen = chosen.scatter_add(0, experts.flatten(), weights.repeat_interleave(self.top_k))
            probability = probability + (probabilities.float() * weights.unsqueeze(-1)).sum(dim=0)
        return RoutingSums(chosen, weights.sum() * len(self.logits), probability)


@dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens and layers.

    Attributes:
        chosen: How often each expert was chosen, `(num_experts,)`.
        num_tokens: Tokens of all layers, a scalar.
        probability: Summed probability of each expert, `(num_experts,)`, carrying gradients.
    """

    chosen: Tensor
    num_tokens: Tensor
    probability: Tensor

    def loss(self, whole: "RoutingSums") -> Tensor:
        """What this part contributes to `num_experts * sum_e f_e p_e` of the whole; the parts add up to it."""
        num_tokens = whole.num_tokens.clamp(min=1)
        return len(self.chosen) * (whole.chosen / num_tokens * self.probability / num_tokens).sum()


class RoutingRecorder:
    """A context in which a model does not compute its router loss; what the loss is made of is kept instead.

    The model would compute it from this forward pass alone, and take the mask of packed attention for one of tokens.
    Once the model has run, `routing` holds what was found; None if the model computes no such loss. `value` is what the
    model is given for the loss.
    """

    def __init__(self, model: nn.Module, value: float = 0.0) -> None:
        self.routing: Routing | None = None
        self._module, self._value = _module_with_loss(model), value
        self._original: Callable[..., Any] | None = getattr(self._module, _FUNCTION, None)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __enter__(self) -> "RoutingRecorder":
        if self._module is not None:
            setattr(self._module, _FUNCTION, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        if self._module is not None:
            setattr(self._module, _FUNCTION, self._original)

    @property
    def has_loss(self) -> bool:
        """Whether there is such a loss for models of this kind."""
        return self._module is not None

    def own_loss(self) -> Any:
        """What the model itself would have computed."""
        return None if self._original is None else self._original(*self._call[0], **self._call[1])

    def _record(self, *args: Any, **kwargs: Any) -> Tensor:
        self._call = args, kwargs
        named = signature(cast(Callable[..., Any], self._original)).bind(*args, **kwargs).arguments
        logits = named["gate_logits"]
        if logits:
            self.routing = Routing(tuple(logits), named["num_experts"], named["top_k"])
        return torch.full((), self._value, dtype=torch.float32, device=logits[0].device if logits else None)


def _module_with_loss(model: nn.Module) -> ModuleType | None:
    for kind in type(model).__mro__:  # a sharded model's class is made for it, and derived from the original
        module = sys.modules.get(kind.__module__)
        if hasattr(module, _FUNCTION):
            return module
    return None
