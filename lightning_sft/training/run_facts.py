"""What a run's model card says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import lightning as L
from transformers import PreTrainedModel

from lightning_sft.data.rows.shown import shown_path, shown_settings
from lightning_sft.loops.trainer_state import logged_metrics
from lightning_sft.model.builder import ModelBuilder

_OF_OPTIMIZER = ("lr", "betas", "momentum", "weight_decay")
_OF_MODULE = ("lr_scheduler", "warmup_steps", "max_grad_norm", "loss_normalization", "normalize_constant")


@dataclass(frozen=True)
class RunFacts:
    """What a model card says of a run. A checkpoint holds these as a dictionary: all values are plain.

    Attributes:
        base_model: Name or path of the model that was fine-tuned; None if it was trained from scratch.
        data: Names and sizes of the data.
        settings: Of data, optimizer, loss and trainer, by their arguments' names.
        results: Metrics, as last measured.
        measured_at: After how many optimizer steps each of them was measured, where that is known.
        prompt_template: What prompts were put into; None if they were taken as they came.
    """

    base_model: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    measured_at: dict[str, int] = field(default_factory=dict)
    prompt_template: str | None = None


def run_facts(trainer: L.Trainer) -> RunFacts:
    """What a model card says of a run of an `SFTModule`, and of what its datamodule knows; every process has to ask."""
    module = trainer.lightning_module
    of_data: dict[str, Any] = getattr(getattr(trainer, "datamodule", None), "facts", dict)()
    name = getattr(cast(PreTrainedModel, module.model).config, "_name_or_path", "")
    devices = {"precision": str(trainer.precision), "devices": trainer.world_size}
    metrics = logged_metrics(trainer)
    return RunFacts(
        base_model=shown_path(name or "") or None,
        data=of_data.get("data", {}),
        settings={"optimizer steps": trainer.global_step}
        | of_data.get("settings", {})
        | _of_optimizer(trainer)
        | _of_module(module)
        | devices,
        results={
            name: value
            for name, value in sorted(metrics.items())
            if name.startswith(("val/", "test/")) or name == "train/loss"
        },
        measured_at=dict(getattr(module, "measured_at", {})),
        prompt_template=of_data.get("prompt_template"),
    )


def run_settings(trainer: L.Trainer) -> dict[str, Any]:
    """All that a run was made with, by the names that the command line gives them; for loggers."""
    made = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    of_module, of_data = (
        dict(found) if isinstance(found := getattr(each, "settings", None), Mapping) else {} for each in made
    )
    optimizers = trainer.optimizers
    if optimizers:
        of_module["optimizer"] = type(optimizers[0]).__name__
        of_module |= {f"optimizer.{name}": value for name, value in shown_settings(optimizers[0].defaults).items()}
    of_trainer = {"precision": str(trainer.precision), "devices": trainer.world_size, "max_steps": trainer.max_steps}
    of_trainer |= {"strategy": type(trainer.strategy).__name__}
    of_trainer |= {"val_check_interval": getattr(trainer, "val_check_interval", None)}  # none if it is a time
    parts = {"model": of_module, "data": of_data, "trainer": of_trainer}
    flat: dict[str, Any] = {}
    for part, settings in parts.items():
        for name, value in settings.items():
            if isinstance(value, dict):
                flat |= {f"{part}.{name}.{inner}": str(each) for inner, each in value.items()}
            else:
                flat[f"{part}.{name}"] = value
    return flat


def _of_optimizer(trainer: L.Trainer) -> dict[str, Any]:
    if not trainer.optimizers:
        return {}
    optimizer = trainer.optimizers[0]
    settings = {name: optimizer.defaults[name] for name in _OF_OPTIMIZER if name in optimizer.defaults}
    return {"optimizer": type(optimizer).__name__} | settings


def _of_module(module: L.LightningModule) -> dict[str, Any]:
    settings = {name: module.hparams.get(name) for name in _OF_MODULE}
    builder = cast(ModelBuilder, module.builder)
    if builder.lora:
        settings["LoRA"] = ", ".join(f"{name} {value}" for name, value in builder.lora.items())
    if builder.adapter_folder is not None:
        settings["LoRA from"] = shown_path(str(builder.adapter_folder))
    if settings["loss_normalization"] == "token":
        del settings["normalize_constant"]
    return settings
