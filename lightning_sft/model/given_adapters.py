"""A model that `peft` has put adapters into already: taken as it is, if its checkpoints can be loaded again."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_sft.errors import SettingsError
from lightning_sft.model.lora import add_lora, has_lora, settings_of
from lightning_sft.model.pretrained import build_empty_model
from lightning_sft.model.stored_adapters import check_same_settings, config_of_lora

_CAME = "`model` has adapters by `peft`, whose configuration has"


def without_wrapper(model: Any) -> Any:
    """The model that a `peft.PeftModel` is around, with its adapters in it; anything else is returned as it is.

    Raises:
        SettingsError: If its adapters are none of LoRA.
    """
    if not (has_lora(model) and callable(getattr(model, "get_base_model", None))):
        return model
    inner = model.get_base_model()
    if not has_lora(inner):  # they are not in its layers
        for config in model.peft_config.values():
            config_of_lora(config.to_dict(), _CAME)
    return inner


def has_foreign_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters that were not put in by `add_lora`, or noted by `keep_adapters`."""
    return has_lora(model) and not hasattr(model, "lora_settings")


def settings_of_given(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which `add_lora` makes the adapters that `peft` has put into a model.

    Refused are adapters of other settings than the user gives beside the model. So are those that could not be made
    again when a checkpoint is loaded: several, no LoRA, merged, switched off, or beside other trained weights.
    """
    adapters: Mapping[str, Any] = model.peft_config
    if list(adapters) != ["default"]:
        raise SettingsError(
            f"`model` has the adapters {', '.join(adapters)}, but only one is supported, named `default`. Load only "
            "that: `lora.path` takes its folder."
        )
    config = config_of_lora(adapters["default"].to_dict(), _CAME)
    check_same_settings(given, config, "the adapters of `model` are made")
    settings = settings_of(config)
    _check_made_again(model, settings)
    return settings


def _check_made_again(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Refuse adapters that `add_lora` would not make again by these settings, or of which other weights are trained."""
    for module in model.modules():
        if getattr(module, "merged", False) is True:
            raise SettingsError("`model` has adapters that are merged into its weights. Call its `unmerge_adapter()`.")
        if getattr(module, "disable_adapters", False) is True:
            raise SettingsError("`model` has adapters that are switched off. Call its `enable_adapter_layers()`.")
    again = build_empty_model(model.config.to_dict(), {"dtype": model.dtype})
    add_lora(again, settings)
    here, there = (dict(each.named_parameters(remove_duplicate=False)) for each in (model, again))
    own = {name for name, weight in there.items() if weight.requires_grad}
    misfits = [f"`{name}` exists only in the model" for name in here if name not in there]
    misfits += [f"`{name}` is missing in the model" for name in there if name not in here]
    misfits += [
        f"`{name}` is {tuple(here[name].shape)}" for name in own & here.keys() if here[name].shape != there[name].shape
    ]
    scales = _scales(model)
    misfits += [f"`{name}` has another scale" for name, scale in _scales(again).items() if scales.get(name) != scale]
    if misfits:
        raise SettingsError(
            f"`model` has adapters that do not match their configuration: {misfits[0]}. A checkpoint of them could not "
            "be loaded again. Save them with `save_pretrained`, and continue from that folder (`lora.path`)."
        )
    trained = {name for name, weight in here.items() if weight.requires_grad}
    if not trained:
        raise SettingsError(
            "`model` has adapters that are frozen. Load them with `is_trainable=True`, or give their folder as "
            "`lora.path`."
        )
    if beside := sorted(trained - own):
        raise SettingsError(
            f"`model` has adapters, and `{beside[0]}` is to be trained beside them, which a checkpoint could not "
            "restore. Freeze it, or name its layer in `modules_to_save` of the adapters."
        )
    if frozen := sorted(own - trained):
        raise SettingsError(
            f"`model` has adapters of which `{frozen[0]}` is frozen. Give the patterns of what is not to be trained as "
            "`freeze`."
        )


def _scales(model: nn.Module) -> dict[str, float]:
    """What the adapter of each layer is multiplied by."""
    layers = {name: getattr(module, "scaling", None) for name, module in model.named_modules()}
    return {name: scale["default"] for name, scale in layers.items() if isinstance(scale, dict) and "default" in scale}
