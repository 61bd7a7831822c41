"""The folders that the settings of a command give to its runs."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from lightning_sft.cli.run_settings import RunSettings


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger"])
@pytest.mark.parametrize(("name", "expected"), [("x", "logs/x"), (None, "logs"), ("", "logs")])
def test_the_runs_of_a_logger_without_a_name_are_in_its_save_dir(kind, name, expected):
    logger = Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=Namespace(save_dir="logs", name=name))
    settings = RunSettings(Namespace(trainer=Namespace(default_root_dir=None, logger=logger)))
    assert settings.folder == Path.cwd() / expected


@pytest.mark.parametrize("name", ["plain", "2024", "a: b"])
def test_mlflow_s_runs_of_an_experiment_are_found_whatever_its_name(tmp_path, name):
    """Which YAML has in quotes, if it is that of a number or holds a colon."""
    for number, experiment in enumerate([name, "another"]):
        logger = {"class_path": "MLFlowLogger", "init_args": {"save_dir": str(tmp_path), "experiment_name": experiment}}
        run = tmp_path / "1" / str(number)
        (run / "checkpoints").mkdir(parents=True)
        torch.save({}, run / "checkpoints" / "last.ckpt")
        (run / "config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    of_first = Namespace(class_path="MLFlowLogger", init_args=Namespace(save_dir=str(tmp_path), experiment_name=name))
    settings = RunSettings(Namespace(trainer=Namespace(default_root_dir=None, logger=of_first)))
    assert settings.newest_checkpoint() == tmp_path / "1" / "0" / "checkpoints" / "last.ckpt"
