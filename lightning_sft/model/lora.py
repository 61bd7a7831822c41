"""LoRA by `peft`: adapters inside a model, and the plain model that they make of it."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_sft.errors import SettingsError, one_line, shorten

_NOT_SET = {"peft_type", "auto_mapping", "task_type", "inference_mode"}  # always those of training a causal model
_DEFAULTS: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora_config(settings: Mapping[str, Any]) -> Any:
    """A `peft.LoraConfig`.

    Args:
        settings: Its arguments, such as `r`, `lora_alpha`, `target_modules` or `modules_to_save`. Unless they say
            otherwise, every linear layer but the head is adapted.

    Raises:
        ImportError: If `peft` is not installed.
        ValueError: If an argument is unknown or has a wrong value.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("`lora` needs the package `peft`: pip install 'lightning-sft[lora]'") from None
    known = set(inspect.signature(LoraConfig).parameters) - _NOT_SET
    for name in settings:
        if name not in known:
            raise SettingsError(f"`lora` has `{name}`, which cannot be set. These can: {_listed(known)}.")
    rank = settings.get("r", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SettingsError(f"`lora.r` is {rank!r}, expected a rank of at least 1.")
    try:
        return LoraConfig(**(_DEFAULTS | copy.deepcopy(dict(settings))))  # it adds to lists that it is given
    except (TypeError, ValueError) as error:
        raise SettingsError(f"`lora` is {shorten(dict(settings), 200)}: {one_line(error, 200)}") from error


def _listed(names: set[str]) -> str:
    first = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
    return ", ".join(f"`{name}`" for name in (*first, *sorted(names - set(first))))


def add_lora(model: PreTrainedModel, settings: Mapping[str, Any], seed: int = 0) -> None:
    """Put adapters into a model, in place. Everything else but `modules_to_save` is frozen; outputs stay as they were.

    Args:
        model: The base model; it may be without data (on `meta`), or quantised by bitsandbytes.
        settings: As for `lora_config`.
        seed: Of the adapters' first weights.

    Raises:
        ImportError: If `peft` is not installed.
        ValueError: If the settings are wrong, or name no layer of this model.
    """
    from peft import inject_adapter_in_model  # `add_adapter` of transformers asks for a version newer than any there is

    _keep_trainable(model)
    quantized: Any = model  # `peft` asks for these; whoever quantised the model need not have set them
    quantized.is_loaded_in_4bit = any(type(weight).__name__ == "Params4bit" for weight in model.parameters())
    quantized.is_loaded_in_8bit = any(type(weight).__name__ == "Int8Params" for weight in model.parameters())
    tied, given = _is_tied(model), dict(settings)
    if tied and settings.get("modules_to_save"):
        settings = {"ensure_weight_tying": True} | dict(settings)
    config = lora_config(settings)
    config.base_model_name_or_path = model.name_or_path
    device = "meta" if model.device.type == "meta" else "cpu"  # numbers drawn there are the same for every device
    with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # it sets it right by itself
        warnings.filterwarnings("ignore", ".*ensure_weight_tying")  # looked at below
        warnings.filterwarnings("ignore", ".*`lora_bias=True`")  # likewise
        torch.default_generator.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except (TypeError, ValueError) as error:
            linear = sorted({name.rpartition(".")[2] for name, each in model.named_modules() if _is_linear(each)})
            raise SettingsError(
                f"`lora` does not fit {type(model).__name__}: {one_line(error, 300)} Its linear layers are "
                f"{', '.join(linear)}."
            ) from error
    if tied and not _is_tied(model):
        raise SettingsError(
            f"`lora` would adapt one of {type(model).__name__}'s embeddings and head, which share their weights. Leave "
            "both out of `target_modules`, or put one of them, by its full name, into `modules_to_save`: of "
            "`model.embed_tokens` and `lm_head` that which this architecture does not tie to the other."
        )
    without_bias = [name for name, each in model.named_modules() if _has_bias_for_none(each)]
    if without_bias:
        raise SettingsError(
            f"`lora.lora_bias` is true, but `{without_bias[0]}` has no bias that its own could be merged into. Leave "
            "it out, or name only layers with a bias in `target_modules`."
        )
    model.lora_settings = given  # type: ignore[assignment]
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype.itemsize < 4:
            weight.data = weight.data.float()  # half precision would lose small steps


def _keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, which it does on CPUs with bfloat16 arithmetic.

    Its layers do so when they first run in eval mode, in place and for good, and their kernel for packed weights has no
    gradient. On other CPUs and on CUDA nothing changes.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise SettingsError(
                "`model` has run in eval mode on this CPU, for which bitsandbytes has packed its 4-bit weights for "
                "inference. Adapters cannot be trained beside packed weights. Load the model anew, or give its name."
            )
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_tied(model: PreTrainedModel) -> bool:
    layers = [trained_layer(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    adapted = any(hasattr(layer, "base_layer") for layer in layers)
    return not adapted and layers[0].weight is getattr(layers[1], "weight", None)


def _has_bias_for_none(module: Any) -> bool:
    return bool(getattr(module, "lora_bias", {}).get("default")) and module.base_layer.bias is None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def trained_layer(layer: Any) -> Any:
    """The layer itself, or the copy of it that is trained as a whole (`modules_to_save`)."""
    return layer.modules_to_save["default"] if hasattr(layer, "modules_to_save") else layer


def has_lora(model: nn.Module) -> bool:
    """Whether there are adapters in a model."""
    return bool(getattr(model, "peft_config", None))


def check_settings(model: nn.Module, settings: Mapping[str, Any] | None) -> None:
    """Refuse to go on with adapters of other settings than those that are asked for.

    Args:
        model: With adapters, or without.
        settings: As for `add_lora`; None: nothing is asked for, and adapters that somebody else put in may stay.

    Raises:
        ValueError: If they differ.
    """
    found = getattr(model, "lora_settings", None if settings is None else "settings of somebody else")
    if has_lora(model) and found != settings:
        raise SettingsError(
            f"`model` has adapters by {shorten(found, 200)} in it already, but `lora` is {shorten(settings, 200)}. "
            "Load the model anew."
        )


def changes_base(settings: Mapping[str, Any]) -> bool:
    """Whether the adapters' initialisation changes the frozen weights too, so that alone they are of no use."""
    kind = settings.get("init_lora_weights", True)
    return isinstance(kind, str) and kind.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes holds some of the weights."""
    return any(_is_quantized_layer(module) for module in model.modules())


def plain_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same, by the names of that model.

    An adapted weight `W` becomes `W + B A`, added in float32 and rounded once to the dtype of `W`; quantised ones are
    expanded to the dtype that they computed in. Nothing about `model` changes.

    Args:
        model: The model, not sharded. Layers are copied one after another.

    Raises:
        ValueError: If quantised layers are adapted in a way that is more than a sum.
    """
    weights = model.state_dict()
    done: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in done) or (layer := _plain_layer(module)) is None:
            continue
        done.append(f"{name}.")
        weights = {key: weight for key, weight in weights.items() if not key.startswith(done[-1])}
        weights |= {f"{name}.{key}": weight for key, weight in layer.state_dict().items()}
    return weights


def lora_settings(model: Any) -> dict[str, Any]:
    """The settings of a model's adapters, as `add_lora` takes them."""
    config = model.peft_config["default"]
    known = set(inspect.signature(type(config)).parameters) - _NOT_SET
    return {name: value for name, value in vars(config).items() if name in known}


def adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is trained of a model with adapters, by the names that `peft` stores it under.

    Args:
        model: The model; it may be sharded.
        weights: Its state dict, whole.
    """
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, dict(weights), save_embedding_layers=False)
    # Copies, since tied weights share their memory, which safetensors does not take.
    return {f"base_model.model.{name}": weight.detach().cpu().clone() for name, weight in found.items()}


def save_adapter(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads on top of the base model."""
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)
    save_file(dict(weights), folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def _plain_layer(module: nn.Module) -> nn.Module | None:
    """What stands for this layer in a model without adapters; None if it is plain itself."""
    if (trained := trained_layer(module)) is not module:
        return copy.deepcopy(trained).to(next(module.get_submodule("original_module").parameters()).dtype)
    if not hasattr(module, "base_layer"):
        return _expanded(module) if _is_quantized_layer(module) else None
    adapted: Any = module
    base = adapted.base_layer
    if _is_quantized_layer(base):
        if adapted.use_dora["default"]:
            raise SettingsError(
                "DoRA of quantised weights cannot be merged. Export the adapter alone: `merge_lora` false."
            )
        plain = _expanded(base)
        delta = adapted.get_delta_weight("default").to("cpu", torch.float32)
        plain.weight = nn.Parameter((plain.weight.float() + delta).to(plain.weight.dtype), requires_grad=False)
        return plain
    dtype = base.weight.dtype
    adapted = copy.deepcopy(adapted).to("cpu", torch.promote_types(dtype, torch.float32))
    adapted.merge()
    return adapted.base_layer.to(dtype)


def _is_quantized_layer(module: nn.Module) -> bool:
    return type(getattr(module, "weight", None)).__module__.startswith("bitsandbytes")


def _expanded(module: Any) -> nn.Linear:
    from peft.utils.integrations import dequantize_bnb_weight

    weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).detach().cpu()
    bias = None if module.bias is None else module.bias.detach().to("cpu", weight.dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
