"""`ModelBuilder`: makes the model that is trained, with its adapters."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lightning_sft.checks import check_integer, check_type
from lightning_sft.model.lora import add_lora, check_settings, has_lora, lora_config
from lightning_sft.model.parameter_names import check_patterns, freeze
from lightning_sft.model.precision import FLOAT32, Precision
from lightning_sft.model.pretrained import build_empty_model, build_model


@dataclass
class ModelBuilder:
    """Where a model comes from, and what adapters it gets.

    Attributes:
        source: Name or folder of a pretrained model; or the settings of a configuration with `model_type`; or a model.
        model_kwargs: For `from_pretrained` or `from_config`.
        lora: Settings of adapters, as for `add_lora`. None: no adapters.
        seed: Of weights that are drawn, those of adapters included.
        freeze: Patterns of names of parameters that are not trained. None: all are, or all adapters.

    Raises:
        SettingsError: If one of them cannot be used.
    """

    source: str | dict[str, Any] | PreTrainedModel
    model_kwargs: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    seed: int = 0
    freeze: list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, Path):
            self.source = str(self.source)
        check_type("model", self.source, (str, dict, PreTrainedModel), "a name, a path, settings or a model")
        check_type("model_kwargs", self.model_kwargs, dict, "a mapping of arguments", optional=True)
        check_type("lora", self.lora, dict, "a mapping of arguments", optional=True)
        check_integer("seed", self.seed, at_least=0)
        check_patterns("freeze", self.freeze)
        if self.lora is not None:
            lora_config(self.lora)  # refuses what is wrong now rather than after loading

    @property
    def base(self) -> str | dict[str, Any] | None:
        """What adapters are on top of: a name, or settings; None for a model without a name."""
        if isinstance(self.source, PreTrainedModel):
            return self.source.name_or_path or None
        return self.source

    def build(self, precision: Precision = FLOAT32) -> PreTrainedModel:
        """The model, loaded or initialised in main memory; a model that was given stays where it is.

        Args:
            precision: Of the trainer.

        Raises:
            SettingsError: If there is no such model, or the adapters do not fit it.
        """
        if isinstance(self.source, PreTrainedModel):
            return self.adapt(self.source)
        return self.adapt(build_model(self.source, self._options(precision), self.seed))

    def build_empty(self, precision: Precision = FLOAT32) -> PreTrainedModel:
        """The same model on `meta`: shapes and types, no values; nothing of its weights is read.

        Args:
            precision: Of the trainer.

        Raises:
            SettingsError: If there is no such model, or the adapters do not fit it.
        """
        if isinstance(self.source, PreTrainedModel):
            return self.adapt(build_empty_model(self.source.config.to_dict(), {"dtype": self.source.dtype}))
        return self.adapt(build_empty_model(self.source, self._options(precision)))

    def adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put adapters into a model, if it is to have some and has none yet, and freeze what is not to be trained.

        Args:
            model: Changed in place.

        Returns:
            `model` itself.

        Raises:
            SettingsError: If it has adapters of other settings, or settings or patterns do not fit it.
        """
        check_settings(model, self.lora)
        if self.lora is not None and not has_lora(model):
            add_lora(model, self.lora, self.seed)
        if self.freeze:
            freeze(model, self.freeze)
        return model

    def arguments_for(self, model: PreTrainedModel) -> dict[str, Any]:
        """The arguments `model` and `model_kwargs` of `SFTModule` by which a checkpoint's weights find their model.

        Without adapters the checkpoint holds all weights, and the model's configuration is enough. With adapters it
        holds them alone, so the model that they are on top of is named.

        Args:
            model: That this builder has made.

        Returns:
            Plain values, so that no code is pickled.
        """
        if self.lora is None:
            return {"model": model.config.to_dict()}
        kwargs = (self.model_kwargs or {}) | {"dtype": str(model.dtype).removeprefix("torch.")}
        plain = {  # of an object such as `BitsAndBytesConfig` its settings
            name: json.loads(value.to_json_string()) if hasattr(value, "to_json_string") else value
            for name, value in kwargs.items()
        }
        return {"model": self.base, "model_kwargs": plain}

    def _options(self, precision: Precision) -> dict[str, Any]:
        # Frozen weights in float32 would be no more exact than in the type that they are stored in.
        as_stored = self.lora is not None and isinstance(self.source, str) and precision.is_half
        return ({"dtype": "auto"} if as_stored else {}) | (self.model_kwargs or {})
