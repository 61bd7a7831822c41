"""The model of a checkpoint, to be exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lightning_sft.errors import SettingsError, is_missing_path
from lightning_sft.export.whole_model import give_weights
from lightning_sft.model.lora import add_lora
from lightning_sft.model.pretrained import build_model
from lightning_sft.training.checkpoint_weights import model_weights, read_checkpoint
from lightning_sft.training.run_facts import RunFacts
from lightning_sft.training.stored_settings import HYPER_PARAMETERS


def load_checkpoint(path: str | Path, weights_only: bool = True) -> tuple[PreTrainedModel, RunFacts]:
    """The model of a checkpoint, in the precision that it was trained in, on the CPU; and what its card says.

    Buffers that no checkpoint holds, such as rotary frequencies, are missing: the model is good for exporting only.

    Args:
        path: The file, or the folder that a sharded model is saved to.
        weights_only: Refuse what could run code: more than tensors and plain values.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, weights_only)
    hyper_parameters = checkpoint.get(HYPER_PARAMETERS, {})
    settings, lora = hyper_parameters.get("model"), hyper_parameters.get("lora")
    if lora is not None:
        model = _load_base(path, hyper_parameters)
        add_lora(model, lora, hyper_parameters.get("seed", 0))
    elif isinstance(settings, dict) and settings.get("model_type") not in CONFIG_MAPPING:
        raise SettingsError(
            f"`ckpt_path` is {str(path)!r}, whose model has the `model_type` {settings.get('model_type')!r}, which "
            "this version of `transformers` does not know. If it brings code of its own, load it by "
            "`SFTModule.load_from_checkpoint(path, model=name_or_folder, model_kwargs={'trust_remote_code': True})`, "
            "and pass its `model` to `export_model`."
        )
    elif isinstance(settings, dict):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    else:
        raise SettingsError(
            f"`ckpt_path` is {str(path)!r}, which does not describe its model: it was not written by an `SFTModule`."
        )
    if "generation_config" in checkpoint:
        model.generation_config = GenerationConfig.from_dict(checkpoint["generation_config"])
    give_weights(model, model_weights(checkpoint), strict=lora is None)
    return model, RunFacts(**checkpoint.get("model_card", {}))


def _load_base(path: Path, hyper_parameters: Mapping[str, Any]) -> PreTrainedModel:
    """The model that a checkpoint's adapters are for."""
    source = hyper_parameters["model"]
    if source is None or (isinstance(source, str) and is_missing_path(source)):
        base = "a model without a name" if source is None else f"the model {source!r}, which is not there"
        raise SettingsError(
            f"`ckpt_path` is {str(path)!r}, which holds adapters of {base}. Load it by "
            "`SFTModule.load_from_checkpoint(path, model=base_model)`, and pass its `model` to `export_model`."
        )
    return build_model(source, hyper_parameters.get("model_kwargs", {}), hyper_parameters.get("seed", 0))
