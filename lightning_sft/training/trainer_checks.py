"""Strategies, precisions and callbacks of Lightning that `SFTModule` cannot be trained with."""

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_sft.errors import SettingsError

_FINDERS: dict[type[Callback], str] = {LearningRateFinder: "find_lr", BatchSizeFinder: "find_batch_size"}


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse strategies, precisions and callbacks that would fail later, or have no effect without saying so.

    Args:
        trainer: Before it runs.

    Raises:
        SettingsError: Naming the way out.
    """
    strategy = type(trainer.strategy).__name__
    if strategy in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise SettingsError(
            f"`trainer.strategy` is {strategy}, which cannot train with manual optimization. To shard the model add "
            "`--config fsdp` (`ModelParallelStrategy`); to copy it to each device use `ddp`."
        )
    if trainer.state.fn == "fit":
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            _check_callback(callback, is_sharded=isinstance(trainer.strategy, ModelParallelStrategy))
    if trainer.strategy.root_device.type == "mps":
        raise SettingsError(
            "`trainer.accelerator` is MPS, which has no float64, and sums of losses are kept in that. Set it to 'cpu'."
        )
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise SettingsError(
            "`trainer.plugins` has `BitsandbytesPrecision`, which makes every linear layer a quantised one, head and "
            "adapters included. Set `model.model_kwargs.quantization_config` instead, and `model.lora`."
        )


def _check_callback(callback: Callback, is_sharded: bool) -> None:
    for finder, way_out in _FINDERS.items():
        if isinstance(callback, finder):
            raise SettingsError(
                f"Lightning's `{finder.__name__}` does not work with manual optimization. Use "
                f"`lightning_sft.{way_out}(module, datamodule)` or `lightning-sft {way_out}` before the run."
            )
    if isinstance(callback, StochasticWeightAveraging):
        raise SettingsError(
            "`StochasticWeightAveraging` counts epochs, but to the trainer a run is a single one. Use Lightning's "
            "`WeightAveraging` or `EMAWeightAveraging`, which count optimizer steps."
        )
    if isinstance(callback, WeightAveraging) and is_sharded:
        raise SettingsError(
            f"`{type(callback).__name__}` copies the whole model, but the model is sharded. Use `ddp`, or train "
            "without an average."
        )
