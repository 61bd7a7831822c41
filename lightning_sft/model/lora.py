"""Adapters of LoRA beside frozen weights, by `peft`."""

import copy
import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_sft.checks import check_integer
from lightning_sft.errors import MissingPackageError, SettingsError, one_line, shorten
from lightning_sft.model.quantization import keep_from_packing

if TYPE_CHECKING:
    from peft import LoraConfig

_WRITTEN = {
    *("peft_type", "auto_mapping", "task_type", "inference_mode"),  # always those of training a causal model
    *("base_model_name_or_path", "revision", "peft_version", "runtime_config"),  # of whoever stores adapters
}
_NOT_SET = _WRITTEN | {
    *("megatron_config", "megatron_core"),  # layers of another library
    *("alora_invocation_tokens", "arrow_config", "layer_replication"),  # cannot be merged
    *("kasa_config", "monteclora_config"),  # want a loss of their own
}
_OF_FIRST_WEIGHTS = {"init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}
_OTHER_DEFAULTS = ("target_modules", "ensure_weight_tying")  # of which the defaults are others here
_FROM_DATA = ("eva", "corda", "lora_ga")  # first weights that are computed from data before the training
_LINEAR = (nn.Linear, Conv1D)
_DEFAULTS: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def import_peft() -> Any:
    """The package `peft`, or an error that says how to install it."""
    try:
        import peft
    except ImportError:
        raise MissingPackageError("`lora` needs the package `peft`: pip install 'lightning-sft[lora]'") from None
    return peft


def lora_config(settings: Mapping[str, Any]) -> "LoraConfig":
    """The configuration that `peft` makes of the settings.

    Args:
        settings: Arguments of `peft.LoraConfig`, such as `r`, `lora_alpha`, `target_modules` or `modules_to_save`.
            Unless they say otherwise, every linear layer but the head is adapted; see `not_adapted` for exceptions.
    """
    peft = import_peft()
    known = set(inspect.signature(peft.LoraConfig).parameters) - _NOT_SET
    for name in settings:
        if name not in known:
            raise SettingsError(f"`lora` has `{name}`, which cannot be set. These can: {_listed(known)}.")
    if settings.get("trainable_token_indices") is not None:
        raise SettingsError(
            "`lora` has `trainable_token_indices`, which would train, but could not be merged into the model "
            "afterwards. Train all embeddings instead: put their name, such as `embed_tokens`, into `modules_to_save`."
        )
    check_integer("lora.r", settings.get("r", 8), at_least=1)
    first = settings.get("init_lora_weights")
    if isinstance(first, str) and first.lower().startswith(_FROM_DATA):
        raise SettingsError(
            f"`lora.init_lora_weights` is {first!r}, for which rows have to be run through the model first. Let `peft` "
            "do that, and pass the model with adapters that it makes as `model`; or leave it out."
        )
    arguments = _DEFAULTS | copy.deepcopy(dict(settings))  # it adds to lists that it is given
    try:
        return cast("LoraConfig", peft.LoraConfig(**arguments))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"`lora` is {shorten(dict(settings), 200)}: {one_line(error, 200)}") from error


def _listed(names: set[str]) -> str:
    first = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
    return ", ".join(f"`{name}`" for name in (*first, *sorted(names - set(first))))


def add_lora(model: PreTrainedModel, settings: Mapping[str, Any], seed: int = 0) -> None:
    """Put adapters into a model, in place. Everything else but `modules_to_save` is frozen; outputs stay as they were.

    Args:
        model: The base model; it may be without data (on `meta`), or quantised by bitsandbytes.
        settings: As for `lora_config`; refused if they do not fit the model.
        seed: Of the adapters' first weights.
    """
    if model.config.model_type == "reformer":
        raise SettingsError(
            "`lora` does not fit Reformer, whose reversible layers have no gradients unless its embeddings are "
            "trained. Train the whole model."
        )
    keep_from_packing(model)
    tied = _is_tied(model)
    tying = {"ensure_weight_tying": True} if tied and settings.get("modules_to_save") else {}
    chosen = settings.keys() & {"target_modules", "exclude_modules"}
    by_default = {} if chosen else {"exclude_modules": not_adapted(model)}
    config = lora_config(tying | by_default | dict(settings))
    config.base_model_name_or_path = model.name_or_path
    _inject(model, config, seed)
    if tied and not _is_tied(model):
        if settings.get("modules_to_save") and not config.ensure_weight_tying:
            raise SettingsError(
                f"`lora.ensure_weight_tying` is false, so embeddings and head of {type(model).__name__}, which share "
                "their weights, would be trained apart. Leave it out. (Of adapters that were stored so, let `peft` "
                "merge them into a model of `tie_word_embeddings` false, and train that.)"
            )
        raise SettingsError(
            f"`lora` would adapt one of {type(model).__name__}'s embeddings and head, which share their weights. Leave "
            "both out of `target_modules`, or put one of them, by its full name, into `modules_to_save`: the one of "
            "`model.embed_tokens` and `lm_head` that this architecture does not tie to the other."
        )
    without_bias = [name for name, each in model.named_modules() if _has_bias_for_none(each)]
    if without_bias:
        raise SettingsError(
            f"`lora.lora_bias` is true, but `{without_bias[0]}` has no bias that its own could be merged into. Leave "
            "it out, or name only layers with a bias in `target_modules`."
        )
    keep_adapters(model, settings)


def keep_adapters(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Note on a model that its adapters, all that is trained of it, are those that `add_lora` makes by `settings`.

    They are converted to float32 in place, or to the type of the model if that is more precise.
    """
    model.lora_settings = dict(settings)  # type: ignore[assignment]
    model.save_pretrained = partial(_save_pretrained, model)  # type: ignore[method-assign]
    trained = [(name, each) for name, each in model.named_parameters(remove_duplicate=False) if each.requires_grad]
    model.adapter_names = frozenset(name for name, _ in trained)  # type: ignore[assignment]
    dtype = torch.promote_types(model.dtype, torch.float32)  # half precision would lose small steps
    for _, weight in trained:
        weight.data = weight.data.to(torch.promote_types(weight.dtype, dtype))


def _save_pretrained(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Write no adapters that nobody can load: `transformers` knows of those alone that it has loaded itself."""
    if not model._hf_peft_config_loaded and any(hasattr(each, "base_layer") for each in model.modules()):
        raise SettingsError(
            f"`save_pretrained` would write {type(model).__name__} by the names that its layers have beside adapters, "
            "for which `from_pretrained` would draw new weights. Use `lightning_sft.export_model(model, folder, "
            "tokenizer)`, which merges the adapters, or with `merge_lora=False` writes them alone."
        )
    type(model).save_pretrained(model, *args, **kwargs)


def adapter_names(model: nn.Module) -> frozenset[str]:
    """The names of the weights that a model's adapters consist of, biases and whole copies of layers among them."""
    return getattr(model, "adapter_names", frozenset())


def not_adapted(model: nn.Module) -> list[str] | None:
    """Names of a base model's linear layers that get no adapter by default; None if there are none.

    Some are called as no linear layer is, such as routers that return a tuple. Those of a state-space mixer have their
    weights read by its kernels without being called, so an adapter beside them would do nothing.
    """
    names = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        mixer = model.get_submodule(name.rpartition(".")[0])
        is_read = hasattr(mixer, "ssm_state_size") and name.endswith(("x_proj", "dt_proj", "out_proj"))
        if is_read or not _is_called_as_linear(layer):
            names.append(name)
    return names or None


def _is_called_as_linear(layer: nn.Linear) -> bool:
    if type(layer).forward is nn.Linear.forward or type(layer).__module__.startswith("bitsandbytes"):
        return True
    weights = {name: torch.empty_like(weight, device="meta") for name, weight in layer.named_parameters()}
    try:
        output = torch.func.functional_call(layer, weights, (torch.empty(3, layer.in_features, device="meta"),))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (3, layer.out_features)


def _inject(model: PreTrainedModel, config: "LoraConfig", seed: int) -> None:
    """Let `peft` put the adapters in: `add_adapter` of transformers asks for a version of it that is not out yet."""
    from peft import inject_adapter_in_model

    quantized: Any = model  # `peft` asks for these; whoever quantised the model need not have set them
    kinds = {type(weight).__name__ for weight in model.parameters()}
    quantized.is_loaded_in_4bit, quantized.is_loaded_in_8bit = "Params4bit" in kinds, "Int8Params" in kinds
    device = "meta" if model.device.type == "meta" else "cpu"  # numbers drawn there are the same for every device
    with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # it sets it right by itself
        warnings.filterwarnings("ignore", ".*ensure_weight_tying")  # `add_lora` looks at it
        warnings.filterwarnings("ignore", ".*`lora_bias=True`")  # likewise
        torch.default_generator.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model)
        except (TypeError, ValueError) as error:
            linear = {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, _LINEAR)}
            raise SettingsError(
                f"`lora` does not fit {type(model).__name__}: {one_line(error, 300)} Its linear layers are "
                f"{', '.join(sorted(linear))}."
            ) from error


def _is_tied(model: PreTrainedModel) -> bool:
    layers = [trained_layer(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    adapted = any(hasattr(layer, "base_layer") for layer in layers)
    return not adapted and layers[0].weight is getattr(layers[1], "weight", None)


def _has_bias_for_none(module: Any) -> bool:
    return bool(getattr(module, "lora_bias", {}).get("default")) and module.base_layer.bias is None


def trained_layer(layer: Any) -> Any:
    """The layer itself, or the copy of it that is trained as a whole (`modules_to_save`)."""
    return layer.modules_to_save["default"] if hasattr(layer, "modules_to_save") else layer


def has_lora(model: nn.Module) -> bool:
    """Whether there are adapters in a model."""
    return bool(getattr(model, "peft_config", None))


def lora_settings(model: Any) -> dict[str, Any]:
    """The settings that a model's adapters were made by, or would be."""
    if (found := getattr(model, "lora_settings", None)) is not None:
        return dict(found)
    config = model.peft_config["default"]
    return settings_of(config) | {"init_lora_weights": config.init_lora_weights}


def settings_of(config: "LoraConfig") -> dict[str, Any]:
    """The settings by which `add_lora` makes adapters of the same layers and shapes, with other first weights."""
    default = type(config)()
    names = set(inspect.signature(type(config)).parameters) - _WRITTEN - _OF_FIRST_WEIGHTS
    settings = {
        name: getattr(config, name) for name in sorted(names) if getattr(config, name) != getattr(default, name)
    }
    settings |= {name: getattr(config, name) for name in _OTHER_DEFAULTS}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def check_settings(model: nn.Module, settings: Mapping[str, Any] | None) -> None:
    """Refuse to train adapters that were put into a model before, by other settings than those asked for."""
    if has_lora(model) and (found := lora_settings(model)) != settings:
        raise SettingsError(
            f"`model` has adapters by {shorten(found, 200)} in it already, but `lora` is {shorten(settings, 200)}. "
            "Load the model anew."
        )


def changes_base(settings: Mapping[str, Any]) -> bool:
    """Whether the adapters' initialisation changes the frozen weights too, so that alone they are of no use."""
    kind = settings.get("init_lora_weights", True)
    return isinstance(kind, str) and kind.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
