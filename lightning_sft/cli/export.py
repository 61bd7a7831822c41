"""`lightning-sft export`: from a checkpoint to a model for everyone."""

from pathlib import Path

import yaml
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_local
from lightning_sft.data.chat.chat_template import read_chat_template, with_chat_template
from lightning_sft.data.tokens.tokenizer import load_tokenizer
from lightning_sft.errors import MissingFileError, SettingsError, path_from_here
from lightning_sft.export.checkpoint import load_checkpoint
from lightning_sft.export.huggingface import ExportDtype, check_export_folder, export_model
from lightning_sft.training.checkpoint_files import newest_checkpoint


def export(
    ckpt_path: str,
    output: str,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    dtype: ExportDtype | None = None,
    merge_lora: bool = True,
    weights_only: bool | None = None,
) -> None:
    """Write a checkpoint's model to a folder that `AutoModelForCausalLM.from_pretrained` loads.

    The folder holds safetensors, configuration, tokenizer with chat template, generation configuration and a model card
    with the run's data, settings and results. The data is not needed.

    Args:
        ckpt_path: A checkpoint; or `last`: the newest one below `runs`, or of the run whose `config.yaml` is given as
            `--config`.
        output: Folder to write: missing, empty, or an earlier export, which is replaced.
        tokenizer: Name, path or object. Default: as in the run's config.yaml, in the folder above the checkpoint's.
        dtype: Dtype of the exported weights. Default: that of the checkpoint.
        merge_lora: Merge adapters into the weights. False: write only the adapters.
        weights_only: Refuse a checkpoint that could run code. Default: true.

    Raises:
        MissingFileError: If there is no such checkpoint.
        SettingsError: If it is not whole, could run code, or has no tokenizer; or the folder holds something else.
    """
    path = newest_checkpoint(Path("runs")) if ckpt_path == "last" else Path(ckpt_path).expanduser()
    if path is None:
        raise MissingFileError("`ckpt_path` is 'last', but there is no complete checkpoint below `runs`.")
    check_local("output", output)
    folder = Path(output).expanduser()
    check_export_folder(folder)
    model, facts = load_checkpoint(path, weights_only is not False)
    if tokenizer is None:
        tokenizer = _tokenizer_of_run(path.absolute().parents[1] / "config.yaml")
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    export_model(model, folder, tokenizer, facts, dtype, merge_lora)
    print(f"{path_from_here(path)} is now a model in {path_from_here(folder)}")


def _tokenizer_of_run(config: Path) -> PreTrainedTokenizerBase:
    settings = (yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None) or {}
    data = settings.get("data") or {}
    found, chat_template = data.get("tokenizer"), data.get("chat_template")
    if found is None:
        raise SettingsError(
            f"`tokenizer` is not given, and {path_from_here(config)} does not name one. Give `--tokenizer`."
        )
    parser = ArgumentParser()
    parser.add_argument("--tokenizer", type=str | PreTrainedTokenizerBase)
    tokenizer = parser.instantiate_classes(parser.parse_object({"tokenizer": found})).tokenizer
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return tokenizer if chat_template is None else with_chat_template(tokenizer, read_chat_template(chat_template))
