"""Trial runs: training steps on a trainer of their own, after which the module is as it was."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_sft.callbacks import StepProgressBar
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.errors import SettingsError
from lightning_sft.training.guard import StepGuard
from lightning_sft.training.module import SFTModule

# No files, no validation, and a length of its own.
_OWN_OPTIONS: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "max_epochs": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "fast_dev_run": False,
    "barebones": False,
}


class Trial(L.Callback):
    """What happens in a trial run; subclasses add what they look at. It remembers what the run changes in the module.

    Attributes:
        saved: Trainable weights and buffers as they were before the first step, in main memory.
    """

    saved: dict[str, Tensor]

    def check(self, trainer: L.Trainer) -> None:
        """Refuse a trainer that the trial cannot run on."""
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise SettingsError(
                "`strategy` trains in its own processes, and their results are lost when they end. Use one device, or "
                "`ddp` in a script or on the command line."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy trainable weights and buffers to main memory."""
        self.saved = {name: tensor.to("cpu", copy=True) for name, tensor in _changing(pl_module).items()}

    def restore(self, module: L.LightningModule) -> None:
        """Put them back, and drop gradients."""
        tensors = _changing(module)
        for name, value in getattr(self, "saved", {}).items():
            tensors[name].copy_(value)
        module.zero_grad()


def _changing(module: L.LightningModule) -> dict[str, Tensor]:
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    tensors = weights | dict(module.named_buffers())
    return {name: (each.to_local() if hasattr(each, "to_local") else each).detach() for name, each in tensors.items()}


def run_trial(
    trial: Trial,
    module: SFTModule,
    num_steps: int,
    trainer_options: dict[str, Any],
    *,
    datamodule: SFTDataModule | None = None,
    loader: Iterable[OptimizerStep] | None = None,
) -> None:
    """Train for some steps, and leave module, data and random states as they were, but for the model, which is loaded.

    Steps whose loss or gradient norm is not a finite number are skipped. Optimizer and schedule are made for the trial.

    Args:
        trial: What to do in it.
        module: What is trained.
        num_steps: Optimizer steps.
        trainer_options: Arguments of the run's trainer. Those that write files or validate are replaced, and callbacks
            are left out.
        datamodule: The data; None if there is a `loader`.
        loader: Gives optimizer steps in place of the data.
    """
    options = trainer_options | _OWN_OPTIONS | {"max_steps": num_steps}
    bar = [StepProgressBar()] if options.get("enable_progress_bar") is not False else []
    trainer = L.Trainer(**(options | {"callbacks": [trial, *bar]}))
    trial.check(trainer)
    random_states = ExitStack()
    random_states.enter_context(isolate_rng(include_cuda=False))  # those of CUDA are set anew in each step
    trainer_of_module, trainer_of_data = _trainer_of(module), getattr(datamodule, "trainer", None)
    guard, module.guard = module.guard, StepGuard("skip")
    try:
        # An empty list of validation batches, since Lightning warns if it is given none at all.
        trainer.fit(module, loader, None if loader is None else [], datamodule)
    finally:
        trial.restore(module)
        module.guard, module.trainer = guard, trainer_of_module
        if datamodule is not None:
            datamodule.trainer = trainer_of_data
        random_states.close()  # which `isolate_rng` itself does not do after an exception


def _trainer_of(module: L.LightningModule) -> L.Trainer | None:
    try:
        return module.trainer
    except RuntimeError:  # it has none
        return None
