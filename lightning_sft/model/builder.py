"""`ModelBuilder`: makes the model that is trained, with its adapters."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lightning_sft.checks import check_integer, check_type
from lightning_sft.errors import SettingsError, shorten
from lightning_sft.hub import split_revision
from lightning_sft.model.given_adapters import has_foreign_adapters, settings_of_given, without_wrapper
from lightning_sft.model.lora import add_lora, check_settings, has_lora, keep_adapters, lora_config
from lightning_sft.model.parameter_names import check_patterns, freeze
from lightning_sft.model.precision import FLOAT32, Precision
from lightning_sft.model.pretrained import build_empty_model, build_model
from lightning_sft.model.stored_adapters import StoredAdapters, is_adapter_folder
from lightning_sft.model.tied_head import say_if_untied


@dataclass
class ModelBuilder:
    """Where a model comes from, and what adapters it gets.

    Attributes:
        source: Name or folder of a pretrained model; or the settings of a configuration with `model_type`; or a model.
            A folder of adapters stands for the model that they are on top of, and for `lora.path`. A name may have a
            revision, `name@revision`, which goes to `model_kwargs`.
        model_kwargs: For `from_pretrained` or `from_config`. Beside a model there may be none but its `dtype` and
            `revision`, as a checkpoint has them.
        lora: Settings of adapters, as for `add_lora`; `path`: the folder of adapters to begin with. Whatever was given,
            it then holds the settings by which `add_lora` makes them. None: no adapters.
        seed: Of weights that are drawn, those of adapters included.
        freeze: Patterns of names of parameters that are not trained. None: all are, or all adapters.
        commit: Of the model that was built, if it came from a hub.
    """

    source: str | dict[str, Any] | PreTrainedModel
    model_kwargs: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    seed: int = 0
    freeze: list[str] | None = None
    commit: str | None = field(default=None, init=False)
    _stored: StoredAdapters | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        revision = None
        if isinstance(self.source, str | Path):
            self.source, revision = split_revision(os.path.expanduser(str(self.source)))
        self.source = without_wrapper(self.source)
        check_type("model", self.source, (str, dict, PreTrainedModel), "a name, a path, settings or a model")
        check_type("model_kwargs", self.model_kwargs, dict, "a mapping of arguments", optional=True)
        check_type("lora", self.lora, dict, "a mapping of arguments", optional=True)
        check_integer("seed", self.seed, at_least=0)
        check_patterns("freeze", self.freeze)
        if revision is not None:
            if (other := (self.model_kwargs or {}).get("revision", revision)) != revision:
                raise SettingsError(
                    f"`model` is '{self.source}@{revision}', but `model_kwargs` has the `revision` {other!r}. Give "
                    "only one of them."
                )
            self.model_kwargs = (self.model_kwargs or {}) | {"revision": revision}
        unused = set(self.model_kwargs or {}) - {"dtype", "revision"}
        if isinstance(self.source, PreTrainedModel) and unused:
            raise SettingsError(
                f"`model_kwargs` has `{min(unused)}`, but `model` is a model, and they are arguments of loading or "
                "building one. Leave them out, or set `model_kwargs=None` if a checkpoint has them."
            )
        self._find_adapters()
        if self.lora is not None:
            lora_config(self.lora)  # refuses what is wrong now rather than after loading

    def _find_adapters(self) -> None:
        """Take adapters that there are already, in a folder or in the model, for what they are."""
        given = dict(self.lora or {})
        path = given.pop("path", None)
        if isinstance(self.source, str) and is_adapter_folder(self.source):
            if path is not None:
                raise SettingsError(
                    f"`model` is {self.source!r}, a folder of adapters, and `lora.path` is {path!r}, another one. Give "
                    "their base model as `model`."
                )
            self._stored = StoredAdapters.read(self.source, given)
            self.source, revision = split_revision(self._stored.base)
            if revision is not None:
                self.model_kwargs = {"revision": revision} | (self.model_kwargs or {})
        elif path is not None:
            self._stored = StoredAdapters.read(path, given)
        if isinstance(self.source, PreTrainedModel) and has_foreign_adapters(self.source):
            if path is not None:
                raise SettingsError(
                    f"`model` has adapters already, and `lora.path` is {path!r}. Give the model without adapters."
                )
            self.lora = settings_of_given(self.source, given)
        elif self._stored is not None:
            self.lora = self._stored.settings

    @property
    def base(self) -> str | dict[str, Any] | None:
        """What adapters are on top of: a name, or settings; None for a model without a name."""
        if isinstance(self.source, PreTrainedModel):
            return self.source.name_or_path or None
        return self.source

    @property
    def adapter_folder(self) -> Path | None:
        """Where the adapters are that training begins with; None if it begins with new ones, or none."""
        return None if self._stored is None else self._stored.folder

    def build(self, precision: Precision = FLOAT32) -> PreTrainedModel:
        """The model, loaded or initialised in main memory; a model that was given stays where it is."""
        if isinstance(self.source, PreTrainedModel):
            return self.adapt(self.source)
        return self.adapt(build_model(self.source, self._options(precision), self.seed))

    def build_empty(self, precision: Precision = FLOAT32) -> PreTrainedModel:
        """The same model on `meta`: shapes and types, no values; nothing of its weights is read."""
        return self.adapt(self.build_empty_base(precision))

    def build_empty_base(self, precision: Precision = FLOAT32) -> PreTrainedModel:
        """The same without adapters, and nothing frozen."""
        if isinstance(self.source, PreTrainedModel):
            return build_empty_model(self.source.config.to_dict(), {"dtype": self.source.dtype})
        return build_empty_model(self.source, self._options(precision))

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put adapters into a model, if it is to have some and has none yet, and freeze what is not to be trained.

        The model is changed in place, and returned. Settings or patterns that do not fit it are refused.
        """
        self.commit = getattr(model.config, "_commit_hash", None)
        if has_foreign_adapters(model):
            if self.lora is None:
                raise SettingsError(
                    f"`model` is {shorten(self.base, 200)}, which brings adapters with it. Download them (`hf download "
                    "NAME --local-dir FOLDER`), and give that folder as `model`."
                )
            keep_adapters(model, self.lora)
        say_if_untied(model.config, model)
        check_settings(model, self.lora)
        if self.lora is not None and not has_lora(model):
            add_lora(model, self.lora, self.seed)
            if self._stored is not None and model.device.type != "meta":
                self._stored.give_to(model)
        if self.freeze:
            freeze(model, self.freeze)
        return model

    def arguments_for(self, model: PreTrainedModel) -> dict[str, Any]:
        """The arguments of `SFTModule`, plain values, by which a checkpoint's weights find the model that was built.

        Without adapters the checkpoint holds all weights, and the model's configuration is enough. With adapters it
        holds them alone, so the model that they are on top of is named, with its commit on the hub, and `lora` has
        their settings in full.
        """
        if self.lora is None:
            return {"model": model.config.to_dict()}
        kwargs = (self.model_kwargs or {}) | {"dtype": str(model.dtype).removeprefix("torch.")}
        kwargs |= {} if self.commit is None else {"revision": self.commit}
        plain = {  # of an object such as `BitsAndBytesConfig` its settings
            name: json.loads(value.to_json_string()) if hasattr(value, "to_json_string") else value
            for name, value in kwargs.items()
        }
        return {"model": self.base, "model_kwargs": plain, "lora": self.lora}

    def _options(self, precision: Precision) -> dict[str, Any]:
        # Frozen weights in float32 would be no more exact than in the type that they are stored in.
        as_stored = self.lora is not None and isinstance(self.source, str) and precision.is_half
        return ({"dtype": "auto"} if as_stored else {}) | (self.model_kwargs or {})
