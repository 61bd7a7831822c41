"""What is made of a model with adapters: the weights of a plain model, or the adapters alone."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.errors import SettingsError
from lightning_sft.model.lora import trained_layer
from lightning_sft.model.quantization import dequantized, is_quantized_layer


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same, by the names of that model.

    An adapted weight `W` becomes `W + B A`, added in float32 and rounded once to the dtype of `W`; quantised ones are
    expanded to the dtype that they computed in. Nothing about `model` changes, which must be whole: its layers are
    copied one after another.
    """
    weights: dict[str, Tensor] = model.state_dict()
    done: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in done) or (layer := _plain_layer(module)) is None:
            continue
        done.append(f"{name}.")
        weights = {key: weight for key, weight in weights.items() if not key.startswith(done[-1])}
        weights |= {f"{name}.{key}": weight for key, weight in layer.state_dict().items()}
    return weights


@torch.no_grad()
def _plain_layer(module: nn.Module) -> nn.Module | None:
    """What stands for this layer in a model without adapters; None if it is plain itself."""
    if (trained := trained_layer(module)) is not module:
        original = module.get_submodule("original_module")
        whole: nn.Module = copy.deepcopy(trained)
        return whole.to(next(original.parameters()).dtype)
    if hasattr(module, "base_layer"):
        return _merged(module)
    return dequantized(module) if is_quantized_layer(module) else None


def _merged(module: Any) -> nn.Module:
    """The layer with its adapter added to the weight."""
    base = module.base_layer
    if not is_quantized_layer(base):
        dtype = base.weight.dtype
        module = copy.deepcopy(module).to("cpu", torch.promote_types(dtype, torch.float32))
        module.merge()
        layer: nn.Module = module.base_layer
        return layer.to(dtype)
    if module.use_dora["default"]:
        raise SettingsError("DoRA of quantised weights cannot be merged. Export the adapter alone: `merge_lora` false.")
    plain = dequantized(base)
    delta = module.get_delta_weight("default").to("cpu", torch.float32)
    plain.weight = nn.Parameter((plain.weight.float() + delta).to(plain.weight.dtype), requires_grad=False)
    return plain


def adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is trained of a model with adapters, by `peft`'s names; `weights` is its state dict, whole."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, dict(weights), save_embedding_layers=False)
    # Copies, since tied weights share their memory, which safetensors does not take.
    return {f"base_model.model.{name}": weight.detach().cpu().clone() for name, weight in found.items()}


def save_adapter(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads on top of the base model."""
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.revision = getattr(model.config, "_commit_hash", None)  # of the base model
    config.save_pretrained(folder)
    save_file(dict(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})
