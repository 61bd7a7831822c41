"""Strategies, devices and callbacks that `SFTModule` cannot be trained with."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from support.fits import ROWS, make_data, make_trainer
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
        self.freeze(pl_module.model)  # Lightning calls this before there is one

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (StochasticWeightAveraging(0.1, swa_epoch_start=1), "`StochasticWeightAveraging` .* `EMAWeightAveraging`"),
        (Unfreeze(), r"`Unfreeze` .* `requires_grad_\(trainer.current_epoch >= N\)`"),
        (ModelPruning("l1_unstructured", amount=0.5), "`ModelPruning` .* `torch.nn.utils.prune`"),
        (GradientAccumulationScheduler({0: 2}), "`GradientAccumulationScheduler` .* `gradient_accumulation_steps`"),
        (ModelCheckpoint(train_time_interval=timedelta(minutes=1)), "`train_time_interval`, .* `every_n_train_steps`"),
    ],
)
def test_a_callback_that_cannot_be_used_is_refused_with_the_way_out(tmp_path, callback, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, callbacks=[callback])


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


def test_checkpoints_of_a_sharded_model_in_a_thread_are_refused():
    strategy = ModelParallelStrategy()
    strategy.checkpoint_io = AsyncCheckpointIO()
    with pytest.raises(ValueError, match="`AsyncCheckpointIO`, but devices write the checkpoint of a sharded model"):
        check_trainer(SimpleNamespace(strategy=strategy, callbacks=[], state=SimpleNamespace(fn="fit")))


def test_a_loader_for_another_number_of_devices_is_refused():
    """Such as `datamodule.train_dataloader()`, asked for before there are processes."""
    module = SFTModule(tiny_model())
    module._trainer = SimpleNamespace(train_dataloader=make_data().train_dataloader(), world_size=2)
    with pytest.raises(ValueError, match=r"steps of 1 device, but there are 2, .* the `SFTDataModule` itself"):
        module.on_train_start()


def test_a_loader_alone_is_refused_where_a_run_continues(tmp_path):
    """It would begin with the rows of the first epoch again."""
    data, path = make_data(val_data=ROWS[:2]), tmp_path / "one.ckpt"
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(SFTModule(tiny_model()), data)
    trainer.save_checkpoint(path)
    loaders = data.train_dataloader(), data.val_dataloader()
    with pytest.raises(ValueError, match=r"continues from a checkpoint, .* Give `trainer.fit` the `SFTDataModule`"):
        make_trainer(tmp_path, max_epochs=2).fit(SFTModule(tiny_model()), *loaders, ckpt_path=path)
