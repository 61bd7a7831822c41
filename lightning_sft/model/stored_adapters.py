"""Adapters that `peft` wrote to a folder: what they are, and how a model gets them."""

import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lightning_sft.checks import check_type
from lightning_sft.errors import SettingsError, and_more, is_missing_path, one_line, shorten
from lightning_sft.hub import split_revision
from lightning_sft.model.lora import adapter_names, changes_base, import_peft, lora_config, settings_of

if TYPE_CHECKING:
    from peft import LoraConfig

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FREE = ("lora_dropout",)  # says how to train, not what the adapters are


def is_adapter_folder(path: str | Path) -> bool:
    """Whether `peft` has written adapters to a folder."""
    return Path(path, _CONFIG).is_file()


def tokenizer_beside(source: str, revision: str | None = None) -> str:
    """Where the tokenizer of a model is: with it; of a folder of adapters without one, with their base model.

    `revision` is that of a model on the hub whose name does not say it.
    """
    source = os.path.expanduser(source)
    if not is_adapter_folder(source):
        is_alone = revision is not None and not os.path.exists(source) and split_revision(source)[1] is None
        return f"{source}@{revision}" if is_alone else source
    return source if Path(source, "tokenizer_config.json").is_file() else StoredAdapters.read(source, {}).base


@dataclass(frozen=True)
class StoredAdapters:
    """Adapters in a folder.

    Attributes:
        folder: Where they are.
        config: As `peft` has stored it.
        settings: The same as settings for `add_lora`, without those that only matter for weights that are drawn.
    """

    folder: Path
    config: "LoraConfig"
    settings: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path, given: Mapping[str, Any]) -> "StoredAdapters":
        """Read the configuration of adapters that can be trained here; their weights are read by `give_to`.

        Args:
            path: The folder.
            given: Settings that the user gives beside it. `lora_dropout` takes effect; all others have to be those of
                the configuration.
        """
        check_type("lora.path", path, (str, os.PathLike), "a folder that `peft` has written")
        folder = Path(path).expanduser()
        config = _read_config(folder)
        check_same_settings(given, config, f"the adapters in {str(folder)!r} are stored", _FREE)
        settings = settings_of(config) | {name: given[name] for name in _FREE if name in given}
        lora_config(settings)  # refuses what is wrong now rather than after loading
        return cls(folder, config, settings)

    @property
    def base(self) -> str:
        """Name, perhaps with a revision, or path of the model that they were trained on; refused if there is none."""
        name = self.config.base_model_name_or_path
        way_out = "Give it as `model`, and the adapters' folder as `lora.path`."
        if not name:
            raise SettingsError(f"The adapters in {str(self.folder)!r} do not name their base model. {way_out}")
        if is_missing_path(name):
            raise SettingsError(
                f"The adapters in {str(self.folder)!r} were trained on top of {name!r}, which is not there. {way_out}"
            )
        revision = self.config.revision
        return name if revision is None or os.path.exists(name) else f"{name}@{revision}"

    def give_to(self, model: PreTrainedModel) -> None:
        """Put their weights into a model with adapters of the same settings, in place."""
        from peft import load_peft_weights, set_peft_model_state_dict

        about = f"The adapters in {str(self.folder)!r}"
        try:
            found = load_peft_weights(str(self.folder), device="cpu")
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise SettingsError(f"{about} cannot be read: {one_line(error, 200)}") from error
        named = {name.removeprefix("base_model.model."): weight for name, weight in found.items()}
        before = {name: weight.clone() for name, weight in model.state_dict().items() if name in named}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*tied")
                result: Any = set_peft_model_state_dict(model, named)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = (
                f"`{error.args[0]}` is missing in the folder" if isinstance(error, KeyError) else _first_misfit(error)
            )
            raise SettingsError(f"{about} do not fit {type(model).__name__}: {reason}.") from error
        own = adapter_names(model)
        misfits = [f"`{name}` is missing in the folder" for name in sorted(own.intersection(result.missing_keys))]
        misfits += [f"`{name}` exists only in the folder" for name in result.unexpected_keys]
        if misfits:
            raise SettingsError(f"{about} do not fit {type(model).__name__}: {misfits[0]}{and_more(misfits)}.")
        after = model.state_dict()
        changed = [name for name in before if name not in own and not torch.equal(before[name], after[name])]
        if changed:
            raise SettingsError(
                f"{about} also hold weights of their base model, and these differ from its own: "
                f"`{changed[0]}`{and_more(changed)}. Merge them, save the whole model and train that."
            )


def _first_misfit(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return one_line(lines[0] if lines else error, 200).rstrip(".")


def _read_config(folder: Path) -> "LoraConfig":
    came = f"`lora.path` is {str(folder)!r}, "
    if not folder.is_dir():
        raise SettingsError(
            f"{came}which is not a folder. Give one that `peft` has written; for adapters on a hub, the folder that "
            "`hf download NAME --local-dir FOLDER` makes."
        )
    if not is_adapter_folder(folder):
        raise SettingsError(f"{came}which has no {_CONFIG}: it holds no adapters that `peft` has written.")
    if (folder / "config.json").is_file():
        raise SettingsError(
            f"{came}which holds adapters and a whole model (config.json). Copy {_CONFIG} and {_WEIGHTS[0]} to a folder "
            "of their own."
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise SettingsError(f"{came}which has {_CONFIG}, but no {_WEIGHTS[0]}.")
    try:
        stored = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{came}whose {_CONFIG} is no JSON: {one_line(error, 200)}") from error
    return config_of_lora(stored if isinstance(stored, dict) else {}, f"{came}whose {_CONFIG} has")


def config_of_lora(stored: Mapping[str, Any], came: str) -> "LoraConfig":
    """The configuration of adapters, given its values as `peft` stores them, if they can be trained here.

    `came` begins the message of an error.
    """
    peft = import_peft()
    kind, task = stored.get("peft_type"), stored.get("task_type")
    if kind != "LORA":
        raise SettingsError(f"{came} `peft_type` {kind}, but only adapters of LoRA are trained here.")
    if task not in (None, "CAUSAL_LM"):
        raise SettingsError(f"{came} `task_type` {task}, but only causal language models (CAUSAL_LM) are trained here.")
    default = vars(peft.LoraConfig())
    later = [name for name, value in stored.items() if name not in default and value]
    if later:
        raise SettingsError(
            f"{came} `{later[0]}`{and_more(later)}, which this version of `peft` does not know. Install a later one."
        )
    if changes_base(stored):
        raise SettingsError(
            f"{came} `init_lora_weights` {stored['init_lora_weights']!r}, which has changed the base model's own "
            "weights. Store them by `peft`'s `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    known = {name: value for name, value in stored.items() if name in default and name != "runtime_config"}
    try:
        return cast("LoraConfig", peft.LoraConfig(**known))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{came} settings that do not fit together: {one_line(error, 200)}") from error


def check_same_settings(given: Mapping[str, Any], config: "LoraConfig", what: str, free: Collection[str] = ()) -> None:
    """Refuse what the user has `given` if it contradicts the configuration of adapters that are there already.

    Settings with the names in `free` may differ. `what` is for the message: "the adapters are stored" or the like.
    """
    lora_config(given)
    for name, value in given.items():
        if name not in free and _plain(value) != _plain(then := getattr(config, name)):
            raise SettingsError(
                f"`lora.{name}` is {shorten(_plain(value))}, but {what} with {shorten(_plain(then))}. Leave it out."
            )


def _plain(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (list | tuple | set)) else value
