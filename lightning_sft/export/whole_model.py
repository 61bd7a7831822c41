"""Models of a given class and configuration that get their weights from elsewhere."""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_sft.model.lora import add_lora, has_lora, lora_settings
from lightning_sft.model.quantization import is_quantized
from lightning_sft.model.tied_head import say_if_untied


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration on `meta`, without adapters, sharding or quantisation."""
    own_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    config = copy.deepcopy(model.config)
    if is_quantized(model) and hasattr(config, "quantization_config"):
        del config.quantization_config
    say_if_untied(config, model)
    with torch.device("meta"):
        return cast("type[PreTrainedModel]", own_class)(config)


def whole_model_with_adapters(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A sharded model with adapters as one that is not sharded; `weights` is its state dict, whole."""
    whole = plain_model(model)
    add_lora(whole, lora_settings(model))
    give_weights(whole, weights)
    return whole


def give_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Put weights into a model on `meta`, as they are: they are not copied, and keep their type."""
    model.load_state_dict(weights, strict=strict, assign=True)
    if not has_lora(model):  # adapters tie the copies that they train of tied weights themselves
        model.tie_weights()
