"""Hugging Face folders: a trained model that `from_pretrained` loads by itself, wherever the folder goes."""

import copy
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.checks import check_choice, check_local, check_type
from lightning_sft.errors import SettingsError, why_not_written
from lightning_sft.export.model_card import TAG, write_card
from lightning_sft.export.whole_model import give_weights, plain_model, whole_model_with_adapters
from lightning_sft.generation.responses import end_ids
from lightning_sft.model.adapter_weights import adapter_weights, plain_weights, save_adapter
from lightning_sft.model.given_adapters import without_wrapper
from lightning_sft.model.lora import changes_base, has_lora, lora_settings
from lightning_sft.model.sharding import is_sharded
from lightning_sft.training.checkpoint_files import take_place
from lightning_sft.training.run_facts import RunFacts

ExportDtype = Literal["float32", "bfloat16", "float16"]


def export_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: RunFacts | None = None,
    dtype: ExportDtype | None = None,
    merge_lora: bool = True,
) -> None:
    """Write a model to a folder that `AutoModelForCausalLM.from_pretrained` loads; its logits are the same to the bit.

    The folder holds safetensors, configuration, generation configuration, tokenizer with chat template, and a model
    card. The configurations name all tokens that end a response: those of `model`, the tokenizer's EOS and the token
    with which its chat template ends a turn. The folder appears once it is complete, and replaces an earlier export.
    `model` is not changed. To export a checkpoint: `export_model(SFTModule.load_from_checkpoint(path).model, folder,
    tokenizer)`.

    Args:
        model: The model, with or without `peft`'s wrapper. If it is sharded, every process has to call this; the first
            gathers the weights in CPU memory and writes them.
        folder: Missing, empty, or an earlier export.
        tokenizer: The model's tokenizer.
        facts: What the model card says of the run.
        dtype: Dtype of the exported weights. Default: that of training: float32 unless the run says otherwise, also
            under `bf16-mixed`.
        merge_lora: Merge adapters into the weights, in float32. False: write only the adapters, a folder for
            `peft.PeftModel.from_pretrained(base_model, folder)`.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        SettingsError: If there is no such dtype, the folder holds something else or cannot be written, or there are no
            adapters to be written alone.
    """
    model = without_wrapper(model)
    check_type("model", model, PreTrainedModel, "a causal language model of `transformers`, such as `module.model`")
    check_type("folder", folder, (str, Path), "the path of a folder")
    check_local("folder", folder)
    check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a tokenizer", optional=True)
    check_export_settings(dtype, merge_lora)
    folder = Path(folder).expanduser().absolute()
    if not merge_lora:
        check_adapters_alone(lora_settings(model) if has_lora(model) else None)
    gathered = _gather_weights(model)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    check_export_folder(folder)
    weights = _merged_weights(model, gathered) if merge_lora else adapter_weights(model, gathered)
    weights = _converted(weights, dtype)
    with _new_folder(folder) as partial:
        if merge_lora:
            whole = plain_model(model)
            give_weights(whole, weights)
            num_parameters, kind = whole.num_parameters(), whole.dtype
            _save_model(whole, model, tokenizer, partial)
        else:
            num_parameters, kind = sum(map(torch.numel, weights.values())), next(iter(weights.values())).dtype
            save_adapter(model, weights, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_card(partial, folder.name, facts or RunFacts(), num_parameters, kind, is_adapter=not merge_lora)


def check_export_settings(dtype: object, merge_lora: object) -> None:
    """Refuse settings of an export that cannot be meant."""
    check_choice("dtype", dtype, ExportDtype, optional=True)
    check_type("merge_lora", merge_lora, bool, "true or false")


def check_adapters_alone(lora: Mapping[str, Any] | None) -> None:
    """Refuse to write adapters without the model that they belong to, where nobody could use them.

    `lora` are their settings; None if there are none.
    """
    if lora is None:
        raise SettingsError("`merge_lora` is false, but the model has no adapters. Set `model.lora`, or leave it true.")
    if changes_base(lora):
        raise SettingsError(
            f"`merge_lora` is false, but `lora.init_lora_weights` is {lora['init_lora_weights']!r}, which also changes "
            "the base model's own weights: with the published weights the adapters would give another model. Leave "
            "`merge_lora` true."
        )


def check_export_folder(folder: str | Path) -> None:
    """Refuse a folder that cannot be written, or holds anything but an earlier export."""
    folder = Path(folder).expanduser()
    came = f"The model is to be exported to {folder}, "
    if (why := why_not_written(folder)) is not None:
        raise SettingsError(f"{came}but {why}. Give another folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    card = folder / "README.md"
    if not (card.is_file() and f"- {TAG}" in card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]):
        raise SettingsError(f"{came}which holds something other than an earlier export. Give another folder.")


def _gather_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights; of a sharded model in main memory, on the first process alone."""
    if not is_sharded(model):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def _merged_weights(model: PreTrainedModel, gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same."""
    if not has_lora(model):
        return gathered
    return plain_weights(whole_model_with_adapters(model, gathered) if is_sharded(model) else model)


def _converted(weights: dict[str, Tensor], dtype: ExportDtype | None) -> dict[str, Tensor]:
    if dtype is None:
        return weights
    kind = getattr(torch, dtype)
    return {name: weight.to(kind) if weight.is_floating_point() else weight for name, weight in weights.items()}


def _save_model(
    whole: PreTrainedModel, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write the weights of `whole`, and configurations that name each token with which a response ends."""
    generation_config = copy.deepcopy(model.generation_config) if model.can_generate() else None
    for config in (whole.config.get_text_config(), generation_config):
        if config is not None and tokenizer is not None:
            own = getattr(config, "eos_token_id", None)
            ids = end_ids(own, tokenizer)
            if ids not in (own, [own], []):
                config.eos_token_id = ids if len(ids) > 1 else ids[0]
    whole.save_pretrained(folder)
    if generation_config is not None:  # as it came: published ones do not always pass the check that saving makes
        path = folder / "generation_config.json"
        generation_config.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `folder`, or what it links to, once everything is written."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, earlier = (folder.with_name(f".{folder.name}.{ending}") for ending in ("partial", "earlier.partial"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(earlier, ignore_errors=True)
        if folder.is_dir():
            os.replace(folder, earlier)
        take_place(partial, folder)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
