"""The folders that the settings of a command give to its runs."""

from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_sft.cli.run_settings import RunSettings


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger"])
@pytest.mark.parametrize(("name", "expected"), [("x", "logs/x"), (None, "logs"), ("", "logs")])
def test_the_runs_of_a_logger_without_a_name_are_in_its_save_dir(kind, name, expected):
    logger = Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=Namespace(save_dir="logs", name=name))
    settings = RunSettings(Namespace(trainer=Namespace(default_root_dir=None, logger=logger)))
    assert settings.folder == Path.cwd() / expected
