"""Strategies, precisions and callbacks of Lightning that `SFTModule` cannot be trained with."""

import warnings
from collections.abc import Iterator

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
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
    # Lightning would warn that it does not step a schedule by a metric; `step_plateau_schedules` does.
    warnings.filterwarnings("ignore", "The lr scheduler dict contains the key")
    strategy = type(trainer.strategy).__name__
    if strategy in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise SettingsError(
            f"`trainer.strategy` is {strategy}, which cannot train with manual optimization. To shard the model add "
            "`--config fsdp` (`ModelParallelStrategy`); to copy it to each device use `ddp`."
        )
    if trainer.state.fn == "fit":
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
            _check_callback(callback, is_sharded, has_validation=getattr(trainer, "limit_val_batches", 0) != 0)
        if (every := getattr(trainer, "reload_dataloaders_every_n_epochs", 0)) > 0:
            raise SettingsError(
                f"`trainer.reload_dataloaders_every_n_epochs` is {every}, but to the trainer a run is a single epoch. "
                "Leave it out: `SFTDataModule` orders its rows anew in each epoch."
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


def _check_callback(callback: Callback, is_sharded: bool, has_validation: bool) -> None:
    for finder, way_out in _FINDERS.items():
        if isinstance(callback, finder):
            raise SettingsError(
                f"Lightning's `{finder.__name__}` does not work with manual optimization. Use "
                f"`lightning_sft.{way_out}(module, datamodule)` or `lightning-sft {way_out}` before the run."
            )
    for argument, way_out in _counting_epochs(callback, has_validation):
        raise SettingsError(
            f"`{type(callback).__name__}`{f' with `{argument}`' if argument else ''} counts epochs, but to the trainer "
            f"a run is a single one. {way_out}"
        )
    if isinstance(callback, WeightAveraging) and is_sharded:
        raise SettingsError(
            f"`{type(callback).__name__}` copies the whole model, but the model is sharded. Use `ddp`, or train "
            "without an average."
        )


def _counting_epochs(callback: Callback, has_validation: bool) -> Iterator[tuple[str, str]]:
    """The arguments by which a callback counts epochs, empty for the callback itself, and what to use instead."""
    if isinstance(callback, StochasticWeightAveraging):
        yield "", "Use Lightning's `WeightAveraging` or `EMAWeightAveraging`, which count optimizer steps."
    if isinstance(callback, BaseFinetuning | ModelPruning):
        yield "", "Do the same in a callback of your own at `trainer.global_step`, in `on_train_batch_start`."
    if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end:
        yield "check_on_train_epoch_end", "Leave it out: it looks after each validation (`trainer.val_check_interval`)."
    if isinstance(callback, LearningRateMonitor) and callback.logging_interval == "epoch":
        yield "logging_interval='epoch'", "Use 'step'."
    if isinstance(callback, ModelCheckpoint):
        steps = "Use `every_n_train_steps`, or leave it out to save after each validation."
        if callback.every_n_epochs is not None and callback.every_n_epochs > 1:
            yield f"every_n_epochs={callback.every_n_epochs}", steps
        if callback._save_on_train_epoch_end and not callback._every_n_train_steps:
            yield "save_on_train_epoch_end=True", steps
        if callback.every_n_epochs == 1 and not has_validation and callback.save_top_k not in (0, 1):
            yield f"save_top_k={callback.save_top_k}", steps
