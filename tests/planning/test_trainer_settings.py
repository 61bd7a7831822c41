"""What a trainer would be, read from its settings as the command line and Python give them."""

import pytest
import torch

from lightning_sft.model.precision import Precision
from lightning_sft.planning.trainer_settings import TrainerSettings


@pytest.mark.parametrize(
    ("devices", "num_nodes", "expected"),
    [(4, 1, 4), ("4", 2, 8), ("0,2,", 1, 2), ([1, 3, 5], None, 3), ("auto", 1, 6), (None, 3, 18), (-1, 1, 6)],
)
def test_devices_are_counted_over_all_nodes(devices, num_nodes, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    settings = TrainerSettings.of({"accelerator": "gpu", "devices": devices, "num_nodes": num_nodes})
    assert settings.on_cuda
    assert settings.num_devices == expected


def test_a_trainer_without_settings_is_that_of_this_machine(monkeypatch):
    expected = TrainerSettings(
        on_cuda=False, num_devices=1, is_sharded=False, precision=Precision(), max_steps=None, max_epochs=None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TrainerSettings.of({}) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TrainerSettings.of({}).on_cuda
    assert not TrainerSettings.of({"accelerator": "cpu"}).on_cuda


@pytest.mark.parametrize(
    "strategy", ["model_parallel", {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}]
)
def test_a_strategy_that_shards_the_model_is_known_by_name_or_class(strategy):
    assert TrainerSettings.of({"strategy": strategy}).is_sharded
    assert not TrainerSettings.of({"strategy": "ddp"}).is_sharded


def test_a_run_ends_at_whichever_limit_comes_first():
    for limits, expected in (
        ({"max_steps": 50, "max_epochs": 3}, 30),
        ({"max_steps": 20, "max_epochs": 3}, 20),
        ({"max_steps": -1, "max_epochs": 3}, 30),
        ({"max_steps": 20, "max_epochs": -1}, 20),
        ({"max_steps": -1, "max_epochs": None}, None),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 40}, 30),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 15),
        ({"max_epochs": 3, "limit_train_batches": None, "overfit_batches": 2}, 6),
    ):
        assert TrainerSettings.of(limits).num_steps(steps_per_epoch=10) == expected


def test_a_precision_whose_memory_is_not_estimated_is_refused():
    with pytest.raises(ValueError, match=r"`precision` is 'transformer-engine', whose copies of weights in 8 bits"):
        TrainerSettings.of({"precision": "transformer-engine"})


@pytest.mark.parametrize(
    "strategy", ["fsdp", "deepspeed_stage_2", {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}]
)
def test_a_strategy_that_cannot_train_is_not_estimated(strategy):
    with pytest.raises(ValueError, match=r"`trainer.strategy` is .*, which cannot train with manual optimization"):
        TrainerSettings.of({"strategy": strategy})
