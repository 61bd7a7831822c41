"""What a run's model card says of it."""

from typing import Any

from lightning_sft.data.shown import shown_path

_OF_OPTIMIZER = ("lr", "betas", "momentum", "weight_decay")
_OF_MODULE = ("lr_scheduler", "warmup_steps", "max_grad_norm", "loss_normalization", "normalize_constant")


def run_facts(trainer: Any) -> dict[str, Any]:
    """What a model card says of a run, in plain values; every process has to ask.

    Args:
        trainer: With an `SFTModule`; what an `SFTDataModule` knows of its rows (`facts`) is part of it.

    Returns:
        `base_model`, its name or None; `data`, `settings` and `results`, each a mapping of names to values.
    """
    module = trainer.lightning_module
    data: dict[str, Any] = getattr(trainer.datamodule, "facts", dict)()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    optimizer = trainer.optimizers[0] if trainer.optimizers else None
    optimizer_facts: dict[str, Any] = {}
    if optimizer is not None:
        optimizer_facts = {"optimizer": type(optimizer).__name__}
        optimizer_facts |= {name: optimizer.defaults[name] for name in _OF_OPTIMIZER if name in optimizer.defaults}
    own = {name: module.hparams.get(name) for name in _OF_MODULE}
    if lora := module.hparams.get("lora"):
        own["LoRA"] = ", ".join(f"{name} {value}" for name, value in lora.items())
    if own["loss_normalization"] == "token":
        del own["normalize_constant"]
    return {
        "base_model": shown_path(getattr(module.model.config, "_name_or_path", "") or "") or None,
        "data": data.get("data", {}),
        "settings": {"optimizer steps": trainer.global_step}
        | data.get("settings", {})
        | optimizer_facts
        | own
        | {"precision": str(trainer.precision), "devices": trainer.world_size},
        "results": {
            name: value for name, value in metrics.items() if name.startswith(("val/", "test/")) or name == "train/loss"
        },
        "prompt_template": data.get("prompt_template"),
    }
