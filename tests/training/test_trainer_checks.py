"""Strategies, devices and callbacks that `SFTModule` cannot be trained with."""

import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from support.models import tiny_config, tiny_model
from support.runs import adamw, train

from lightning_sft import SFTModule
from lightning_sft.training.trainer_checks import check_trainer


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_cannot_train_are_refused_with_the_way_out(name):
    module = SFTModule(tiny_model(), optimizer=adamw)
    module._trainer = type("Trainer", (), {"strategy": type(name, (), {})()})()
    with pytest.raises(ValueError, match=rf"`trainer.strategy` is {name}, which cannot .* `--config fsdp`"):
        module.configure_model()


def test_a_device_without_float64_is_refused():
    strategy = type("SingleDeviceStrategy", (), {"root_device": torch.device("mps")})()
    with pytest.raises(ValueError, match=r"`trainer.accelerator` is MPS, which has no float64.* Set it to 'cpu'"):
        check_trainer(
            SimpleNamespace(strategy=strategy, precision_plugin=None, callbacks=[], state=SimpleNamespace(fn="fit"))
        )


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


@pytest.mark.parametrize(
    ("callback", "named"),
    [
        (StochasticWeightAveraging(0.1, swa_epoch_start=1), "`StochasticWeightAveraging`"),
        (Unfreeze(), "`Unfreeze`"),
        (EarlyStopping("train/loss", check_on_train_epoch_end=True), "with `check_on_train_epoch_end`"),
        (LearningRateMonitor("epoch"), "with `logging_interval='epoch'`"),
        (ModelCheckpoint(every_n_epochs=2), "with `every_n_epochs=2`"),
        (ModelCheckpoint(save_on_train_epoch_end=True), "with `save_on_train_epoch_end=True`"),
        (ModelCheckpoint(every_n_epochs=1, save_top_k=-1), "with `save_top_k=-1`"),
    ],
    ids=lambda value: value.split("`")[1] if isinstance(value, str) else "",
)
def test_a_callback_that_counts_epochs_is_refused_by_name(tmp_path, callback, named):
    options = {"logger": CSVLogger(tmp_path)} if isinstance(callback, LearningRateMonitor) else {}
    with pytest.raises(ValueError, match=f"{re.escape(named)} counts epochs, but to the trainer a run is a single one"):
        train(tmp_path, callbacks=[callback], **options)


def test_reloading_by_epochs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`trainer\.reload_dataloaders_every_n_epochs` is 1"):
        train(tmp_path, reload_dataloaders_every_n_epochs=1)


def test_an_average_of_a_sharded_model_is_refused():
    """Without processes to shard over: the trainer is none."""
    module = SFTModule(tiny_config())
    module._trainer = SimpleNamespace(
        callbacks=[EMAWeightAveraging(decay=0.75, use_buffers=False)],
        strategy=ModelParallelStrategy(),
        state=SimpleNamespace(fn="fit"),
    )
    with pytest.raises(ValueError, match="`EMAWeightAveraging` copies the whole model, but the model is sharded"):
        module.configure_model()
