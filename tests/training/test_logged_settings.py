"""What loggers are told of a run, and where in its epochs each step is."""

import csv

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from support.fits import ROWS, fit, make_data
from support.models import save_tiny_model

from lightning_sft import SFTModule


def test_loggers_are_told_everything_that_was_set(tmp_path):
    save_tiny_model(tmp_path / "small")
    module = SFTModule(
        str(tmp_path / "small"),
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.25, betas=(0.5, 0.75)),
        model_kwargs={"attn_implementation": "eager"},
        lr_scheduler_kwargs={"num_cycles": 2.0},
    )
    fit(tmp_path, module, make_data(val_fraction=0.1), logger=CSVLogger(tmp_path, name=""), log_every_n_steps=1)
    logged = yaml.safe_load((tmp_path / "version_0" / "hparams.yaml").read_text())
    expected = {
        "model.model": "small",
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 0.25,
        "model.optimizer.betas": "0.5, 0.75",
        "model.model_kwargs.attn_implementation": "eager",
        "model.lr_scheduler_kwargs.num_cycles": "2.0",
        "model.gradient_checkpointing": False,
        "data.batch_size": 8,
        "data.train_data": "22 rows",
        "data.val_fraction": 0.1,
        "data.row_transform": None,
        "trainer.max_steps": 6,
        "trainer.precision": "32-true",
        "trainer.devices": 1,
    }
    assert {name: logged[name] for name in expected} == expected


@pytest.mark.parametrize(("options", "length"), [({}, 3), ({"limit_train_batches": 2}, 2)])
def test_each_step_is_logged_with_its_epoch_as_a_fraction(tmp_path, options, length):
    logger = CSVLogger(tmp_path, name="")
    fit(tmp_path, None, make_data(val_data=ROWS[:5]), logger=logger, log_every_n_steps=1, **options)
    rows = list(csv.DictReader((tmp_path / "version_0" / "metrics.csv").read_text().splitlines()))
    assert {row["val/loss"] != "" for row in rows} == {True, False}
    for row in rows:
        assert float(row["epoch"]) == pytest.approx(float(row["step"]) / length)
