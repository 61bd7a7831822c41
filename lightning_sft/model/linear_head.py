"""Where a model's head is, and what the model does to its products."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.model.head import Head
from lightning_sft.model.probing import CALL_ERRORS
from lightning_sft.model.routing import RoutingRecorder
from lightning_sft.model.tiles import LogitTransform


@dataclass(frozen=True)
class LinearHead:
    """A head that is a linear layer, whose products become logits by a transformation that is known.

    Attributes:
        layer: The linear layer.
        transform: What the model does to its products.
        vocab_size: How many of its products the model keeps, from the first on; None: all.
    """

    layer: nn.Linear
    transform: LogitTransform
    vocab_size: int | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens have a logit."""
        return self.vocab_size or max(self.layer.weight.shape[0], self.layer.out_features)  # shards may have no weight

    def as_it_is_now(self) -> Head:
        """The layer's weights, which are whole only while it runs if they are sharded."""
        weight: Tensor = self.layer.weight
        bias: Tensor | None = self.layer.bias
        if self.vocab_size is not None:
            weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
        return Head(weight, bias, self.transform)


@dataclass(frozen=True)
class _Rule:
    transform: LogitTransform
    vocab_size: int | None = None


# What was found of a model is kept, since finding it takes a forward pass, until something else wraps or hooks it, or a
# number of its configuration is changed.
_RULES: WeakKeyDictionary[PreTrainedModel, tuple[object, _Rule | None]] = WeakKeyDictionary()


def find_linear_head(model: nn.Module, transform: LogitTransform | None = None) -> LinearHead | None:
    """The model's head, if it is a linear layer, perhaps scaled, soft-capped and cut, and nothing more.

    Args:
        model: Any module. Only a causal language model of `transformers` has a head that can be found.
        transform: What the model is known to do to the head's products. None: it is tried out when the model is seen
            for the first time.

    Returns:
        The head, or None if the model does something else to make its logits.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    layer = _layer_in_use(model.get_output_embeddings())
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return None
    if transform is not None:
        return LinearHead(layer, transform)
    hooks = tuple(model._forward_hooks), tuple(layer._forward_hooks)
    around = (id(vars(model).get("forward")), type(model).forward, hooks, _numbers(model))
    if model not in _RULES or _RULES[model][0] != around:
        _RULES[model] = around, _tried_out(model, layer)
    rule = _RULES[model][1]
    return None if rule is None else LinearHead(layer, rule.transform, rule.vocab_size)


def _layer_in_use(layer: Any) -> Any:
    """The layer itself, or what runs in its place where adapters bring a copy of it (`modules_to_save`)."""
    if not hasattr(layer, "modules_to_save"):
        return layer
    adapters = [] if layer.disable_adapters else layer.active_adapters
    return layer.modules_to_save[adapters[0]] if adapters else layer.original_module


def configured_transform(model: PreTrainedModel) -> LogitTransform:
    """What the model does to the head's products, as far as its configuration tells."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))


def _tried_out(model: PreTrainedModel, layer: nn.Linear) -> _Rule | None:
    """What the model makes of made-up products, if that is a transformation by numbers of its configuration."""
    device = model.device
    made: list[Tensor] = []

    def made_up(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made.append(torch.linspace(-100, 100, output.numel(), device=output.device).view_as(output).to(output))
        return made[-1]

    hook = layer.register_forward_hook(made_up, prepend=True)  # other hooks may change what the head returns
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            RoutingRecorder(model),
        ):
            logits = model(torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False).logits
    except CALL_ERRORS:
        return None  # who asks for the logits gets the whole traceback
    finally:
        hook.remove()
    if len(made) != 1 or made[0].shape[:-1] != (1, 2) or logits.shape[:-1] != (1, 2):
        return None
    width, vocab_size = made[0].shape[-1], logits.shape[-1]
    if vocab_size > width:
        return None
    tolerance = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    products, logits = made[0][..., :vocab_size].double(), logits.double()
    for transform in _candidates(model, products, logits):
        if torch.allclose(logits, transform.apply(products), rtol=tolerance):
            return _Rule(transform, None if vocab_size == width else vocab_size)
    return None


def _candidates(model: PreTrainedModel, products: Tensor, logits: Tensor) -> Iterator[LogitTransform]:
    """Transformations by numbers of the configuration, whatever their names, of which the slope at 0 is right."""
    yield configured_transform(model)
    numbers = _numbers(model)
    smallest = products.abs().argmin()
    slope = float(logits.flatten()[smallest] / products.flatten()[smallest])
    scales = {1.0} | {scale for value in numbers.values() for scale in (value, 1 / value)}
    caps = [None, *(float(value) for name, value in numbers.items() if "cap" in name and value > 0)]
    for scale in sorted(scales, key=lambda scale: abs(scale - slope)):
        if abs(scale - slope) < 1e-2 * abs(slope):
            yield from (LogitTransform(float(scale), cap) for cap in caps)


def _numbers(model: PreTrainedModel) -> dict[str, float]:
    """The numbers of the configuration other than 0, by their names."""
    settings = vars(model.config) | vars(model.config.get_text_config(decoder=True))
    return {name: value for name, value in settings.items() if isinstance(value, int | float) and value}
