"""What of Lightning a module that steps by itself cannot be trained with."""

from typing import Any

from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_sft.errors import SettingsError

_FINDERS = {LearningRateFinder: "find_lr", BatchSizeFinder: "find_batch_size"}


def check_trainer(trainer: Any) -> None:
    """Refuse strategies, precisions and callbacks that would fail later, or do nothing without a word.

    Args:
        trainer: The module's; None if it has none.

    Raises:
        ValueError: Naming the way out.
    """
    if trainer is None:
        return
    strategy = type(trainer.strategy).__name__
    if strategy in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise SettingsError(
            f"`trainer.strategy` is {strategy}, which cannot train with manual optimisation. To shard the model add "
            "`--config fsdp` (`ModelParallelStrategy`); to copy it to each device use `ddp`."
        )
    for callback in trainer.callbacks if trainer.state.fn == "fit" else ():
        for finder, way_out in _FINDERS.items():
            if isinstance(callback, finder):
                raise SettingsError(
                    f"Lightning's `{finder.__name__}` finds nothing in a module that steps by itself. Use "
                    f"`lightning_sft.{way_out}(module, datamodule)` or `lightning-sft {way_out}`, and another trainer."
                )
        if isinstance(callback, StochasticWeightAveraging):
            raise SettingsError(
                "`StochasticWeightAveraging` counts epochs, but to the trainer a run is a single one. Use Lightning's "
                "`WeightAveraging` or `EMAWeightAveraging`, which count optimizer steps."
            )
        if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, ModelParallelStrategy):
            raise SettingsError(
                f"`{type(callback).__name__}` copies the whole model, but the model is sharded. Use `ddp`, or train "
                "without an average."
            )
    if trainer.strategy.root_device.type == "mps":
        raise SettingsError(
            "`trainer.accelerator` is MPS, which has no float64, and sums of losses are kept in that. Set it to 'cpu'."
        )
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise SettingsError(
            "`trainer.plugins` has `BitsandbytesPrecision`, which makes every linear layer a quantised one, head and "
            "adapters included. Set `model.model_kwargs.quantization_config` instead, and `model.lora`."
        )
