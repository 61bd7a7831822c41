"""Strategies, precisions and callbacks of Lightning that `SFTModule` cannot be trained with."""

import inspect
import warnings

import lightning as L
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO, BitsandbytesPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_sft.data.steps.step_loader import StepLoader
from lightning_sft.errors import SettingsError, counted
from lightning_sft.loops.run_length import INSTEAD_OF_ACCUMULATION, check_accumulation
from lightning_sft.training.stored_settings import check_stored

_FINDER = (
    "it needs automatic optimization. Before the run use `lightning_sft.{0}(module, data)` or `lightning-sft {0}`."
)
_UNFIT: dict[type[Callback], str] = {
    LearningRateFinder: _FINDER.format("find_lr"),
    BatchSizeFinder: _FINDER.format("find_batch_size"),
    GradientAccumulationScheduler: f"a batch is a whole optimizer step. Use {INSTEAD_OF_ACCUMULATION}.",
    StochasticWeightAveraging: "it replaces the run's schedule with its own. Use Lightning's "
    "`WeightAveraging` or `EMAWeightAveraging`, which leave the schedule alone and continue from a checkpoint.",
    BaseFinetuning: "what it unfreezes is not in the optimizer's schedule, and is frozen again when a run continues. "
    "In your own callback call `requires_grad_(trainer.current_epoch >= N)` in `on_train_batch_start`, for the "
    "parameters to be trained from epoch N on.",
    ModelPruning: "its masks are not in a checkpoint, so a run that continues would lose them. Prune the weights "
    "after the run, with `torch.nn.utils.prune`.",
}
_HOOKS = {  # of automatic optimization, which Lightning does not call under manual optimization
    "optimizer_step": "Do that in `training_step`, before or after `super().training_step(batch, batch_idx)`, or in "
    "`on_before_optimizer_step`",
    "optimizer_zero_grad": "Each optimizer step begins with no gradients. Leave it out",
    "configure_gradient_clipping": "Set `max_grad_norm` to none and clip in `on_before_optimizer_step`, after "
    "`super().on_before_optimizer_step(optimizer)`",
}
_EXTENDED = {  # Lightning's own are empty, so few subclasses call them; `SFTModule` and `SFTDataModule` need theirs
    *("setup", "configure_callbacks", "on_fit_start", "on_train_start", "on_validation_start", "on_train_end"),
    *("on_before_optimizer_step", "on_after_optimizer_step", "on_test_start"),
    *("on_save_checkpoint", "on_load_checkpoint"),
    *("train_dataloader", "state_dict", "load_state_dict", "on_exception", "teardown"),
}


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse strategies, precisions and plugins that would fail later, or have no effect without saying so."""
    # Lightning would warn that it does not step a schedule by a metric; `step_plateau_schedules` does.
    warnings.filterwarnings("ignore", "The lr scheduler dict contains the key")
    # It is to save the weights that an optimizer step has left; Lightning would advise to keep those before it.
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    # Steps are counted, and logged, over epochs.
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    check_strategy(type(trainer.strategy).__name__)
    check_before_setup(trainer)  # again, for subclasses with callbacks of their own
    is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    if is_sharded and isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise SettingsError(
            "`trainer.plugins` has `AsyncCheckpointIO`, but devices write the checkpoint of a sharded model together, "
            "and wait for it. Leave it out."
        )
    if trainer.strategy.root_device.type == "mps":
        raise SettingsError(
            "`trainer.accelerator` is MPS, which has no float64, in which sums of losses are kept. Set it to 'cpu'."
        )
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise SettingsError(
            "`trainer.plugins` has `BitsandbytesPrecision`, which quantises every linear layer, including head and "
            "adapters. Set `model.model_kwargs.quantization_config` instead, and `model.lora`."
        )


def check_strategy(name: str) -> None:
    """Refuse a strategy that cannot step by hand, by the name of its class or its short name, such as `fsdp`."""
    if name.rpartition(".")[2].lower().startswith(("fsdp", "deepspeed")):
        raise SettingsError(
            f"`trainer.strategy` is {name}, which cannot train with manual optimization. To shard the model add "
            "`--config fsdp` (`ModelParallelStrategy`); to copy it to each device use `ddp`."
        )


def check_before_setup(trainer: L.Trainer) -> None:
    """Refuse callbacks, hooks and settings that a run cannot be trained with, before any callback is set up."""
    if trainer.state.fn != "fit":
        return
    module = getattr(trainer, "lightning_module", None)
    if getattr(module, "_compiler_ctx", None) is not None:
        raise SettingsError(
            "The module was compiled as a whole (`torch.compile(module)`), with all that an optimizer step does "
            "besides running the model. Give it `compile=True` instead, which compiles the model's blocks."
        )
    if not getattr(module, "automatic_optimization", True):
        _check_left_to_us(trainer)
        _check_hooks(trainer.lightning_module)
    _check_super_is_called(type(module))
    check_stored(module)
    _check_super_is_called(type(getattr(trainer, "datamodule", None)))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_callback(callback, is_sharded=isinstance(trainer.strategy, ModelParallelStrategy))


def put_best_first(trainer: L.Trainer) -> None:
    """Put Lightning's checkpoints before other callbacks that save: `ckpt_path="best"` asks the first of all."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.sort(key=lambda each: isinstance(each, Checkpoint) and not isinstance(each, ModelCheckpoint))


def _check_left_to_us(trainer: L.Trainer) -> None:
    """Refuse accumulation and clipping by the trainer; Lightning's message would advise automatic optimization."""
    check_accumulation(trainer)
    if trainer.gradient_clip_val or trainer.gradient_clip_algorithm:
        name = "gradient_clip_val" if trainer.gradient_clip_val else "gradient_clip_algorithm"
        given = getattr(trainer, name)
        raise SettingsError(
            f"`trainer.{name}` is {getattr(given, 'value', given)}, but `SFTModule` clips gradients itself, by their "
            "total norm over all devices. Use its `max_grad_norm`."
        )


def _check_hooks(module: L.LightningModule) -> None:
    """Refuse hooks of a subclass that would never be called."""
    for name, way_out in _HOOKS.items():
        if is_overridden(name, module, L.LightningModule):
            raise SettingsError(
                f"`{type(module).__name__}.{name}` would never be called: `training_step` takes the optimizer steps "
                f"itself (manual optimization). {way_out}; or set `automatic_optimization`, with a `training_step` of "
                "your own that returns the loss."
            )


def _check_super_is_called(kind: type) -> None:
    """Refuse a subclass whose hooks replace those of this package, which have something to do, without calling them."""
    mro = kind.__mro__
    own = next((place for place, each in enumerate(mro) if each.__module__.startswith("lightning_sft.")), 0)
    for each in mro[:own]:
        for name in vars(mro[own]).keys() & _EXTENDED:
            code = getattr(inspect.unwrap(vars(each).get(name, len)), "__code__", None)
            if code is not None and name not in code.co_names:  # a call has the name of what it calls
                own_loader = " Or give `trainer.fit` the loader alone." if name == "train_dataloader" else ""
                raise SettingsError(
                    f"`{each.__name__}.{name}` does not call `super().{name}`, in which `{mro[own].__name__}` has "
                    f"something to do. Call it, with the same arguments, before or after the rest.{own_loader}"
                )


def check_loader(trainer: L.Trainer) -> None:
    """Refuse a loader without its datamodule where only that knows which rows each device is to be given next."""
    num_devices = getattr(trainer.train_dataloader, "world_size", trainer.world_size)
    if num_devices != trainer.world_size:
        raise SettingsError(
            f"The loader gives steps of {counted(num_devices, 'device')}, but there are {trainer.world_size}, each of "
            "which would train on the same rows. Give `trainer.fit` the `SFTDataModule` itself."
        )
    if isinstance(trainer.train_dataloader, StepLoader) and trainer.ckpt_path is not None:
        raise SettingsError(
            "The run continues from a checkpoint, but it is given a loader, which would begin with the first epoch "
            "again. Give `trainer.fit` the `SFTDataModule` itself."
        )


def _check_callback(callback: Callback, is_sharded: bool) -> None:
    for kind, problem in _UNFIT.items():
        if isinstance(callback, kind):
            raise SettingsError(f"`{type(callback).__name__}` cannot be used: {problem}")
    if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
        raise SettingsError(
            "`ModelCheckpoint` has a `train_time_interval`, after which Lightning saves nothing under manual "
            "optimization. Use `every_n_train_steps`, or `LastCheckpoint(every_n_steps=...)`."
        )
    if isinstance(callback, WeightAveraging) and is_sharded:
        raise SettingsError(
            f"`{type(callback).__name__}` copies the whole model, but the model is sharded. Use `ddp`, or train "
            "without an average."
        )
