"""Models by name, by folder or from settings: with all of their weights, and without running code of theirs."""

import os
import re
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from lightning_sft.errors import SettingsError, and_more, is_missing_path, one_line, shorten
from lightning_sft.hub import commit_of

# Arguments of `from_pretrained` that are of the weights. The others, such as `revision` or `subfolder`, say where the
# configuration is, or change a setting of it.
_OF_WEIGHTS = ("dtype", "attn_implementation", "quantization_config", "device_map")


def build_model(source: str | dict[str, Any], model_kwargs: dict[str, Any], seed: int) -> PreTrainedModel:
    """Load a pretrained model, or initialise one, in main memory whatever the default device.

    Weights that are drawn then are the same on every kind of device. (Quantised ones are where bitsandbytes puts them.)

    Args:
        source: Name or folder; or the settings of a configuration with `model_type`.
        model_kwargs: For `from_pretrained` or `from_config`. Unless they say otherwise, weights are float32.
        seed: Of weights that are drawn.
    """
    # Without an explicit type a half-precision checkpoint would train half-precision weights and moments.
    options = {"dtype": torch.float32, "trust_remote_code": False} | model_kwargs
    if isinstance(source, str):
        with torch.device("cpu"):
            return _load(source, options)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(source), **options)
            return model
    except Exception as error:
        raise _cannot_be_built(source, error) from error


def build_empty_model(source: str | dict[str, Any], model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model that `build_model` makes, on `meta`: of a pretrained one its configuration alone is read."""
    options = {"dtype": torch.float32, "trust_remote_code": False} | model_kwargs
    try:
        if isinstance(source, str):
            _refuse_adapters(source, options)
            of_config = {name: value for name, value in options.items() if name not in _OF_WEIGHTS}
            config = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **of_config)[0]
        else:
            config = _config(source)
        if options["dtype"] == "auto":
            options["dtype"] = config.dtype or torch.float32
        if str(options.get("attn_implementation")).startswith("flash_attention"):
            del options["attn_implementation"]  # whose package need not be here
        known = {
            name: options[name] for name in ("dtype", "trust_remote_code", "attn_implementation") if name in options
        }
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **known)
            return model
    except Exception as error:
        raise _cannot_be_built(source, error) from error


def _config(source: dict[str, Any]) -> PreTrainedConfig:
    settings = dict(source)
    if settings.get("model_type") not in CONFIG_MAPPING:
        raise SettingsError(
            f"`model` is to be built from {shorten(settings)}, whose `model_type` {settings.get('model_type')!r} is "
            "not an architecture that this version of `transformers` knows. Give one, such as qwen2 or llama; or the "
            "name or folder of a model that brings code of its own."
        )
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _cannot_be_built(source: str | dict[str, Any], error: Exception) -> SettingsError:
    if isinstance(error, SettingsError):
        return error
    return SettingsError(f"`model` is {shorten(source, 200)}, which cannot be built: {_reason(error)}")


def _load(source: str, options: dict[str, Any]) -> PreTrainedModel:
    # Otherwise weights of other shapes are named in a log alone, and missing ones are drawn at random.
    known = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        _refuse_adapters(source, options)  # before `transformers` downloads the model that they are on top of
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **(options | known))
    except SettingsError:
        raise
    except Exception as error:
        reason = "there is no such folder." if is_missing_path(source) else _reason(error)
        raise SettingsError(f"`model` is {source!r}, which cannot be loaded: {reason}") from error
    model, loading = loaded
    misfits = [f"lack `{name}`" for name in sorted(loading["missing_keys"])]
    if not options.get("ignore_mismatched_sizes"):
        shapes = [(name, tuple(there), tuple(here)) for name, there, here in sorted(loading["mismatched_keys"])]
        misfits = [f"have `{name}` as {there} instead of {here}" for name, there, here in shapes] + misfits
    if misfits:
        raise SettingsError(
            f"`model` is {source!r}, whose weights {misfits[0]}{and_more(misfits)}: they are not those of its "
            "config.json. To train such a model anyway, load it yourself and pass it as `model`."
        )
    found = commit_of(source, options.get("revision"), "model", options.get("cache_dir"))
    model.config._commit_hash = found or getattr(model.config, "_commit_hash", None)  # which older versions set
    return cast(PreTrainedModel, model)


def _refuse_adapters(source: str, options: dict[str, Any]) -> None:
    """Refuse the name of adapters on a hub."""
    where = {name: options[name] for name in ("revision", "subfolder", "cache_dir", "token") if name in options}
    if not os.path.exists(source) and find_adapter_config_file(source, **where) is not None:
        raise SettingsError(
            f"`model` is {source!r}, which holds adapters. Download them (`hf download {source} --local-dir FOLDER`), "
            "and give that folder as `model`."
        )


def _reason(error: Exception) -> str:
    """Why a model could not be had, with the way out where `transformers` names one that is not ours."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it brings Python code of its own, which is run only if `model_kwargs` has `trust_remote_code: true`. "
            "Read that code first."
        )
    if "Weights only load failed" in text:
        found = re.search(r"GLOBAL (\S+)", text)
        what = f"`{found[1]}`" if found else "objects"
        return f"its weights are a pickle that holds {what}, which could run code. Ask for safetensors instead."
    words = one_line(error)
    return words if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {words}"
