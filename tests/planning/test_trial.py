"""Trial runs leave no trace, and say what they cannot find."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from support.cuda import take_cpu_for_cuda
from support.trials import QUIET, module, rows

from lightning_sft import find_batch_size, find_lr
from lightning_sft.planning.learning_rates import LearningRates


def fit(sft, data, folder):
    options = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, "max_steps": 8}
    trainer = L.Trainer(**QUIET, **options, val_check_interval=4, default_root_dir=folder)
    trainer.fit(sft, data)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return metrics, [weight.detach().clone() for weight in sft.parameters()]


@pytest.mark.parametrize(
    "find",
    [
        lambda *args: find_lr(*args, 1e-4, 1e30, 12, **QUIET),  # to where losses are no numbers
        lambda *args: find_batch_size(*args, **QUIET),
    ],
    ids=["find_lr", "find_batch_size"],
)
def test_a_run_after_finding_is_the_run_without(find, tmp_path, monkeypatch):
    take_cpu_for_cuda(monkeypatch)
    monkeypatch.chdir(tmp_path)
    expected = fit(module(), rows(), tmp_path)
    sft, data = module(), rows()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = find(sft, data)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert not list(tmp_path.iterdir())
    assert not isinstance(found, LearningRates) or (len(found.lrs) < 12 and np.isfinite(found.losses).all())
    assert all(weight.grad is None for weight in sft.parameters())
    metrics, weights = fit(sft, data, tmp_path)
    assert metrics == expected[0]
    assert all(torch.equal(weight, other) for weight, other in zip(weights, expected[1], strict=True))
    assert "train/skipped_steps" not in metrics  # again an error


@pytest.mark.parametrize(
    ("find", "options", "message"),
    [
        (find_lr, {"min_lr": 1e-2, "max_lr": 1e-3}, "`min_lr` is 0.01 and `max_lr` 0.001, expected positive numbers"),
        (find_lr, {"min_lr": 0.0}, "`min_lr` is 0.0"),
        (find_lr, {"num_steps": 1}, "`num_steps` is 1, expected at least 2"),
        (find_lr, {"strategy": "ddp_spawn", "devices": 2}, "their results are lost when they end"),
        (find_batch_size, {"margin": 1.0}, "`margin` is 1.0, expected a fraction"),
        (find_batch_size, {"memory_gib": 0}, "`memory_gib` is 0, expected a positive number"),
        (find_batch_size, {"strategy": "ddp", "devices": 2}, "`devices` are 2, but if memory runs out on one"),
    ],
)
def test_what_cannot_be_found_is_refused(find, options, message, monkeypatch):
    take_cpu_for_cuda(monkeypatch)
    with pytest.raises(ValueError, match=message):
        find(module(), rows(), **(QUIET | options))


@pytest.mark.parametrize(("method", "instead"), [("lr_find", "find_lr"), ("scale_batch_size", "find_batch_size")])
def test_lightning_s_own_finders_say_who_finds(method, instead):
    data = rows()
    data.batch_size = 8  # what Lightning looks for
    trainer = L.Trainer(**QUIET, logger=False, enable_checkpointing=False, max_steps=2)
    message = (
        rf"cannot be used: it needs automatic optimization\. Before the run use `lightning_sft\.{instead}\(module, "
    )
    with pytest.raises(ValueError, match=message):
        getattr(Tuner(trainer), method)(module(), datamodule=data)
