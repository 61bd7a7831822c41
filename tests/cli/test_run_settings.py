"""The folders that the settings of a command give to its runs."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from lightning_sft.cli.checkpoints import find_last_checkpoint
from lightning_sft.cli.run_settings import RunSettings
from lightning_sft.errors import SettingsError


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


FOLDERS = {  # of a run, by the logger that names it
    None: "version_0",
    "TensorBoardLogger": "logs/x/version_0",
    "CSVLogger": "logs/x/version_0",
    "WandbLogger": "logs/x/abc",
    "MLFlowLogger": "logs/1/abc",
}


def saved_run(folder, **files):
    """What is left of a run: its `config.yaml`, a checkpoint unless there is another file."""
    for name, content in ({"checkpoints/last.ckpt": {}} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name) if name.endswith(".ckpt") else (folder / name).write_text(content)
    (folder / "config.yaml").touch()
    return folder


def settings_of(kind, *configs, root=None):
    names = {"WandbLogger": "project", "MLFlowLogger": "experiment_name"}
    options = Namespace({"save_dir": "logs", names.get(kind, "name"): "x"})
    logger = Namespace(class_path=kind, init_args=options) if kind else False
    trainer = Namespace(default_root_dir=root, logger=logger)
    return Namespace(trainer=trainer, config=[*map(str, configs)], ckpt_path="last")


@pytest.mark.parametrize("root", [None, "../work"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_last_is_of_the_run_whose_configuration_is_given(tmp_path, monkeypatch, kind, root):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run = saved_run(Path(FOLDERS[kind]))
    newer = saved_run(run.with_name("version_1"))
    config = settings_of(kind, "own.yaml", run / "config.yaml", root=root)
    find_last_checkpoint(config, continues=True)
    assert config.ckpt_path == str(run.absolute() / "checkpoints" / "last.ckpt")
    RunSettings(config).choose_folder(config.ckpt_path, trains=True)
    options = getattr(config.trainer.logger, "init_args", {})
    version = {"WandbLogger": "id", "MLFlowLogger": "run_id"}.get(kind, "version")
    assert options.get(version) == (run.name if kind else None)
    if kind is None:
        assert Path(config.trainer.default_root_dir) == run.absolute()
    if kind != "MLFlowLogger":  # which has a run's experiment in what is no stub
        both = settings_of(kind, run / "config.yaml", newer / "config.yaml", root=root)
        find_last_checkpoint(both, continues=False)
        assert Path(both.ckpt_path).resolve().parts[-3] == newer.name


def test_it_is_said_which_of_several_runs_is_taken(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    saved_run(Path("logs/x/version_0"))
    find_last_checkpoint(settings_of("CSVLogger"), continues=True)
    assert caplog.text == ""
    saved_run(Path("logs/x/version_1"))
    find_last_checkpoint(settings_of("CSVLogger"), continues=True)
    assert "Of 2 runs below logs/x, logs/x/version_1 was saved last, and is taken." in caplog.text


def test_a_named_run_without_a_checkpoint_is_not_replaced_by_another(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    saved_run(Path("logs/x/version_1"))
    torn = saved_run(Path("logs/x/version_0"), **{"checkpoints/last.ckpt": {}, "hparams.yaml": "{}"})
    (torn / "checkpoints" / "last.ckpt").write_bytes(b"PK torn")
    with pytest.raises(SettingsError, match=r"no complete checkpoint of the run in logs/x/version_0\.$"):
        find_last_checkpoint(settings_of("CSVLogger", torn / "config.yaml"), continues=False)
    config = settings_of("CSVLogger", torn / "config.yaml")
    find_last_checkpoint(config, continues=True)
    assert (config.ckpt_path, config.trainer.logger.init_args.get("version")) == (None, None)
    assert "No checkpoint of the run in logs/x/version_0 yet: a new run starts from the beginning." in caplog.text


def test_a_user_s_own_configuration_is_of_no_run_and_a_moved_run_goes_on_elsewhere(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    run = saved_run(Path("logs/x/version_0"))
    Path("config.yaml").touch()
    config = settings_of("CSVLogger", "config.yaml")
    find_last_checkpoint(config, continues=True)
    assert config.trainer.logger.init_args.version == run.name
    run.rename("kept")
    config = settings_of("CSVLogger", "kept/config.yaml")
    find_last_checkpoint(config, continues=True)
    assert config.ckpt_path == str(tmp_path / "kept" / "checkpoints" / "last.ckpt")
    assert "version" not in config.trainer.logger.init_args
    assert "The run in kept goes on in a new folder below logs/x, where these settings keep runs." in caplog.text
