"""Hugging Face folders: a trained model that `from_pretrained` loads by itself, wherever the folder goes."""

import copy
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.errors import SettingsError
from lightning_sft.export.model_card import TAG, write_card
from lightning_sft.model.lora import (
    adapter_weights,
    add_lora,
    changes_base,
    has_lora,
    is_quantized,
    lora_settings,
    plain_weights,
    save_adapter,
)
from lightning_sft.model.pretrained import build_model
from lightning_sft.model.sharding import is_sharded
from lightning_sft.training.checkpoint_files import check_checkpoint, take_place

ADAPTERS_ALONE = (
    "`merge_lora` is false, but `lora.init_lora_weights` has changed the base model's weights too: its adapters say "
    "nothing without these. Export the merged model."
)
ExportDtype = Literal["float32", "bfloat16", "float16"]


def export_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Mapping[str, Any] | None = None,
    dtype: ExportDtype | None = None,
    merge_lora: bool = True,
) -> None:
    """Write a model to a folder that `AutoModelForCausalLM.from_pretrained` loads; its logits are the same to the bit.

    The folder holds safetensors, configuration, generation configuration, tokenizer with chat template, and a model
    card. It appears once it is complete, in the place of an earlier export. Nothing about `model` changes. Of a
    checkpoint: `export_model(SFTModule.load_from_checkpoint(path).model, folder, tokenizer)`.

    Args:
        model: If it is sharded, every process has to call this. The first gathers the weights in main memory and
            writes them.
        folder: Missing, empty, or an earlier export.
        tokenizer: To go with the model.
        facts: What the model card says (`model_card.run_facts`).
        dtype: To convert weights to. Default: as they are: float32 unless the run said otherwise, also under
            `bf16-mixed`.
        merge_lora: Add adapters to the weights they belong to, in float32. False: write the adapters alone, a folder
            for `peft.PeftModel.from_pretrained(base_model, folder)`.

    Raises:
        ValueError: If the folder holds something else, or there are no adapters to be written alone.
    """
    folder = Path(folder).absolute()
    if not merge_lora and not has_lora(model):
        raise SettingsError("`merge_lora` is false, but the model has no adapters.")
    if not merge_lora and changes_base(lora_settings(model)):
        raise SettingsError(ADAPTERS_ALONE)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_model_state_dict(model, options=options) if is_sharded(model) else model.state_dict()
    weights = cast("dict[str, Tensor]", found)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    check_export_folder(folder)
    if not merge_lora:
        weights = adapter_weights(model, weights)
    elif has_lora(model):
        weights = plain_weights(_with_weights(model, weights) if is_sharded(model) else model)
    if dtype is not None:
        weights = {
            name: weight.to(getattr(torch, dtype)) if weight.is_floating_point() else weight
            for name, weight in weights.items()
        }
    whole = _without_data(model)
    if merge_lora:
        _give_weights(whole, weights)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if merge_lora:
            whole.save_pretrained(partial)
        else:
            save_adapter(model, weights, partial)
        if (
            merge_lora and model.can_generate()
        ):  # as it came: published ones do not always pass the check that saving makes
            path = partial / "generation_config.json"
            model.generation_config.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        num_parameters = sum(weight.numel() for weight in (whole.parameters() if merge_lora else weights.values()))
        kind = whole.dtype if merge_lora else next(iter(weights.values())).dtype
        write_card(partial, folder.name, facts or {}, num_parameters, kind, is_adapter=not merge_lora)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_export_folder(folder: str | Path) -> None:
    """Refuse to write over anything but an earlier export.

    Raises:
        ValueError: If there is something else.
    """
    folder = Path(folder)
    came = f"The model is to be exported to {folder}, "
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{came}which is a file. Give a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    card = folder / "README.md"
    if not (card.is_file() and f"- {TAG}" in card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]):
        raise SettingsError(f"{came}which holds something other than an earlier export. Give another folder.")


def _put_in_place(partial: Path, folder: Path) -> None:
    for path in partial.rglob("*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    earlier = folder.with_name(f".{folder.name}.earlier.partial")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, earlier)
    take_place(partial, folder)
    shutil.rmtree(earlier, ignore_errors=True)


def _without_data(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration, on `meta`, and plain: without adapters, sharding, quantisation."""
    own_class = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    config = copy.deepcopy(model.config)
    if is_quantized(model) and hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return cast("type[PreTrainedModel]", own_class)(config)


def _with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model with the same adapters, but whole."""
    whole = _without_data(model)
    add_lora(whole, lora_settings(model))
    _give_weights(whole, weights)
    return whole


def _give_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], strict: bool = True) -> None:
    """Put weights into a model without any, as they are: no copies, no other dtype."""
    model.load_state_dict(weights, strict=strict, assign=True)
    if not has_lora(model):  # whose own copies are tied to one another
        model.tie_weights()


# -- from checkpoints --------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, weights_only: bool = True) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a checkpoint, in the precision that it was trained in, on the CPU; and what its card says.

    Weights of a file are mapped, not read. Of a sharded model's folder only weights are read, not the optimizer.
    Buffers that no checkpoint holds, such as rotary frequencies, are missing: the model is good for exporting only.

    Args:
        path: The file, or the folder that a sharded model is saved to.
        weights_only: Refuse what could run code: every sharded checkpoint, and files that hold more than tensors and
            plain values.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole checkpoint of an `SFTModule`, or could run code.
    """
    path = Path(path)
    if weights_only or not path.exists():
        check_checkpoint(str(path), resume=False)
    checkpoint = _read_folder(path) if path.is_dir() else _read_file(path, weights_only)
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    settings, lora = hyper_parameters.get("model"), hyper_parameters.get("lora")
    if lora is not None:
        model = _load_base(path, hyper_parameters)
        add_lora(model, lora, hyper_parameters.get("seed", 0))
    elif isinstance(settings, dict):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    else:
        raise SettingsError(
            f"`ckpt_path` is {str(path)!r}, which says nothing of its model: it is not of an `SFTModule`."
        )
    if "generation_config" in checkpoint:
        model.generation_config = GenerationConfig.from_dict(checkpoint["generation_config"])
    _give_weights(model, _of_model(checkpoint["state_dict"]), strict=lora is None)
    return model, checkpoint.get("model_card", {})


def _load_base(path: Path, hyper_parameters: Mapping[str, Any]) -> PreTrainedModel:
    """The model that a checkpoint's adapters are for."""
    source = hyper_parameters["model"]
    if source is None:
        raise SettingsError(
            f"`ckpt_path` is {str(path)!r}, which holds adapters of a model without a name. Load it by "
            "`SFTModule.load_from_checkpoint(path, model=base_model)`, and pass its `model` to `export_model`."
        )
    return build_model(source, hyper_parameters.get("model_kwargs", {}), hyper_parameters.get("seed", 0))


def _read_file(path: Path, weights_only: bool) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)


def _read_folder(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path / "meta.pt", map_location="cpu", weights_only=False)
    reader = FileSystemReader(path)
    weights = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(stored, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # it warns of what it was told to do
        load(weights, storage_reader=reader, no_dist=True)
    return checkpoint | {"state_dict": {name.removeprefix("state_dict."): weights[name] for name in weights}}


def _of_model(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "model."
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
