"""Schedules of the learning rate against those of `transformers`."""

import pytest
import torch
from support.fits import make_data, make_trainer
from support.models import tiny_config
from transformers import get_scheduler

from lightning_sft import SFTModule
from lightning_sft.errors import SettingsError
from lightning_sft.training.schedule import Schedule

NUM_STEPS = 37


def rates(build):
    """The learning rate of each step, and of some after the last."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, found = build(optimizer), []
    for _ in range(NUM_STEPS + 3):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("num_warmup_steps", [0, 1, 5, NUM_STEPS + 10])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("constant_with_warmup", None),
        ("linear", None),
        ("cosine", None),
        ("cosine", {"num_cycles": 2.5}),
        ("cosine_with_min_lr", {"min_lr": 0.1}),
    ],
)
def test_rates_are_those_of_transformers(name, kwargs, num_warmup_steps):
    ours = rates(lambda optimizer: Schedule(name, num_warmup_steps, kwargs).build(optimizer, NUM_STEPS))
    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, num_warmup_steps, NUM_STEPS, kwargs))
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15)


def test_a_constant_rate_has_no_warmup():
    assert set(rates(lambda optimizer: Schedule("constant").build(optimizer, NUM_STEPS))) == {0.3}
    with pytest.raises(SettingsError, match=r"`warmup_steps` is 5. Set `lr_scheduler` to 'constant_with_warmup', or"):
        Schedule("constant", 5)
    with pytest.raises(SettingsError, match="'constant', which has no arguments, but `lr_scheduler_kwargs` is"):
        Schedule("constant", kwargs={"num_cycles": 2})


def test_a_warmup_below_one_is_a_fraction_of_the_run():
    ours = rates(lambda optimizer: Schedule("linear", 0.1).build(optimizer, NUM_STEPS))
    assert ours[:5] == pytest.approx([0.0, 0.075, 0.15, 0.225, 0.3])  # 3.7 steps become 4
    assert ours[NUM_STEPS] == 0.0


@pytest.mark.parametrize("num_warmup_steps", [1, 3])
def test_a_run_may_end_with_its_warmup(num_warmup_steps):
    """`transformers` divides by the number of steps after it."""
    schedule = Schedule("polynomial", num_warmup_steps)
    ours = rates(lambda optimizer: schedule.build(optimizer, num_warmup_steps))
    assert ours[:num_warmup_steps] == pytest.approx([0.3 * step / num_warmup_steps for step in range(num_warmup_steps)])


def test_a_checkpoint_loads_whose_schedule_needs_arguments_that_it_does_not_hold(tmp_path):
    settings = {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}}
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(SFTModule(tiny_config(), **settings), make_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert SFTModule.load_from_checkpoint(tmp_path / "a.ckpt").schedule.name == "warmup_stable_decay"
