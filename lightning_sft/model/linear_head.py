"""Where a model's head is, and what the model does to its products."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.model.lora import trained_layer
from lightning_sft.model.routing import RoutingRecorder
from lightning_sft.model.tiles import LogitTransform


@dataclass(frozen=True)
class LinearHead:
    """A head that is a linear layer, whose products become logits by a transformation that is known.

    Attributes:
        layer: The linear layer.
        transform: What the model does to its products.
    """

    layer: nn.Linear
    transform: LogitTransform


# What was found of a model is kept as long as the model is, since finding it takes a forward pass.
_TRANSFORMS: WeakKeyDictionary[PreTrainedModel, LogitTransform | None] = WeakKeyDictionary()


def find_linear_head(model: nn.Module, transform: LogitTransform | None = None) -> LinearHead | None:
    """The model's head, if it is a linear layer, perhaps scaled and soft-capped, and nothing more.

    Args:
        model: Any module. Only a causal language model of `transformers` has a head that can be found.
        transform: What the model is known to do to the head's products. None: what its configuration says, which is
            tried out when the model is seen for the first time.

    Returns:
        The head, or None if the model does something else to make its logits.
    """
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return None
    layer = trained_layer(model.get_output_embeddings())
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return None
    if transform is None:
        if model not in _TRANSFORMS:
            _TRANSFORMS[model] = _tried_out(model, layer)
        transform = _TRANSFORMS[model]
    return None if transform is None else LinearHead(layer, transform)


def configured_transform(model: PreTrainedModel) -> LogitTransform:
    """What the model does to the head's products, as far as its configuration tells."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(float(scale), getattr(config, "final_logit_softcapping", None))


def _tried_out(model: PreTrainedModel, layer: nn.Linear) -> LogitTransform | None:
    """The configured transformation, if the model makes what it says of made-up products; otherwise None."""
    transform, device = configured_transform(model), model.device
    products: list[Tensor] = []

    def made_up(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        products.append(torch.linspace(-100, 100, output.numel(), device=output.device).view_as(output).to(output))
        return products[-1]

    hook = layer.register_forward_hook(made_up)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            RoutingRecorder(model),
        ):
            logits = model(torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False).logits
    finally:
        hook.remove()
    if len(products) != 1 or products[0].shape[:-1] != (1, 2):
        return None
    tolerance = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    as_configured = torch.allclose(logits.double(), transform.apply(products[0].double()), rtol=tolerance)
    return transform if as_configured else None
