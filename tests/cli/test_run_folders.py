"""Each run has a folder of its own, whatever its logger; a run that continues stays in its folder."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.models import save_tiny_model

from lightning_sft.cli.app import run_command
from lightning_sft.cli.claimed_folders import ClaimedFolders
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import SettingsError

ROWS = [{"prompt": f"q{i}", "output": "abc" * (1 + i % 4)} for i in range(8)]
WANDB = {"trainer.logger": "WandbLogger", "trainer.logger.offline": "true"}
LOGGERS = {  # its settings, the folders of its runs, and what the last line of a run says
    "none": ({"trainer.logger": "false"}, ".", None),
    "Lightning's default": ({}, "lightning_logs", "tensorboard --logdir lightning_logs"),
    "TensorBoard": (
        {"trainer.logger": "TensorBoardLogger", "trainer.logger.save_dir": "logs", "trainer.logger.name": "x"},
        "logs/x",
        "tensorboard --logdir logs/x",
    ),
    "CSV": (
        {"trainer.logger": "CSVLogger", "trainer.logger.save_dir": "logs"},
        "logs/lightning_logs",
        "logs/lightning_logs/version_0/metrics.csv",
    ),
    "W&B": (WANDB | {"trainer.logger.save_dir": "logs"}, "logs/lightning_logs", "wandb sync logs/wandb/offline-run-"),
    "W&B's project": (WANDB | {"trainer.logger.project": "p"}, "p", "wandb sync wandb/offline-run-"),
    "MLflow": (
        {"trainer.logger": "MLFlowLogger", "trainer.logger.save_dir": "logs"},
        "logs/*",
        "mlflow ui --backend-store-uri logs",
    ),
    "MLflow's tracking": (
        {"trainer.logger": "MLFlowLogger", "trainer.logger.tracking_uri": "file:store"},
        "store/*",
        "mlflow ui --backend-store-uri store",
    ),
}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A model and rows; the working directory is empty."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("WANDB_SILENT", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def words(tmp_path, command="fit", **changes):
    options = {
        "model.model": tmp_path / "model",
        "data.train_data": tmp_path / "train.jsonl",
        "data.batch_size": 4,
        "generation.sampling.max_new_tokens": 3,
        "generation.num_prompts": 2,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": False,
        "trainer.log_every_n_steps": 1,
    } | changes
    return [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def runs_in(folder):
    """The folders of runs below a folder, with their numbers of steps; each is whole and holds nothing but its own."""
    found = {}
    for path in Path.cwd().rglob("last.ckpt"):
        run = path.parent.parent
        assert run.match(f"{Path.cwd()}/{folder}") or run.parent.match(f"{Path.cwd()}/{folder}")
        assert (run / "generations" / "index.html").is_file()
        assert (run / "huggingface" / "config.json").is_file()
        found[run] = torch.load(path)["global_step"]
        assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == found[run]
    return found


@pytest.mark.parametrize("name", LOGGERS)
def test_two_runs_have_two_folders_and_continuing_stays_in_the_newest(work, capsys, name):
    settings, folder, line = LOGGERS[name]
    run_command(words(work, **settings, **{"trainer.max_steps": 1}))
    told = capsys.readouterr().out.splitlines()
    curves = [each.split(maxsplit=1)[1] for each in told if each.startswith("Curves:")]
    assert curves == [] if line is None else curves[-1].startswith(line)
    finish()
    run_command(words(work, **settings, **{"trainer.max_steps": 2}))
    finish()
    runs = runs_in(folder)
    assert sorted(runs.values()) == [1, 2]
    newest = next(run for run, steps in runs.items() if steps == 2)
    run_command(words(work, **settings, **{"trainer.max_steps": 4, "ckpt_path": "last"}))
    finish()
    assert runs_in(folder) == runs | {newest: 4}
    assert (newest / "generations" / "step_0.jsonl").is_file()


def finish():
    """As at the end of a process."""
    import wandb

    wandb.finish()


def test_a_run_of_another_experiment_is_not_continued(work):
    settings = LOGGERS["MLflow"][0] | {"trainer.max_steps": 1}
    run_command(words(work, **settings))
    run_command(words(work, **settings, **{"trainer.logger.experiment_name": "other", "ckpt_path": "last"}))
    assert list(runs_in("logs/*").values()) == [1, 1]


def test_a_csv_run_that_continues_keeps_the_numbers_of_its_first_part(work):
    settings = LOGGERS["CSV"][0]
    run_command(words(work, **settings, **{"trainer.max_steps": 2}))
    for max_steps in (3, 4):
        run_command(words(work, **settings, **{"trainer.max_steps": max_steps, "ckpt_path": "last"}))
    parts = [Path("logs/lightning_logs/version_0") / f"metrics{part}.csv" for part in ("_part_1", "_part_2", "")]
    rows = [row for path in parts for row in csv.DictReader(path.read_text().splitlines()) if row["train/loss"]]
    assert [float(row["step"]) for row in rows] == [1, 2, 3, 4]


def test_each_of_several_loggers_goes_on_in_its_own_run(work, capsys):
    """Which are called otherwise than the folder of the run, that the first one names."""

    def loggers(*kinds):
        options = {"CSVLogger": {"save_dir": "tables"}, "WandbLogger": {"offline": True, "save_dir": "logs"}}
        options |= {"TensorBoardLogger": {"save_dir": "curves", "name": "x"}}
        return {"trainer.logger": json.dumps([{"class_path": kind, "init_args": options[kind]} for kind in kinds])}

    run_command(words(work, **loggers("CSVLogger"), **{"trainer.max_steps": 1}))
    several = loggers("TensorBoardLogger", "CSVLogger", "WandbLogger")
    for steps in (2, 4):
        run_command(words(work, **several, **{"trainer.max_steps": steps, "ckpt_path": "last"}))
        finish()
    told = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("Curves:")]
    assert told[-2] == "tables/lightning_logs/version_1/metrics.csv"
    assert told[-1].startswith("wandb sync logs/wandb/offline-run-")
    assert [path.name for path in Path("curves/x").iterdir()] == ["version_0"]
    tables = {path: len(path.read_text().splitlines()) for path in Path("tables").rglob("metrics*.csv")}
    own = Path("tables/lightning_logs/version_1")
    assert {path.parent for path in tables} == {own.with_name("version_0"), own}
    rows = [
        list(csv.DictReader((own / name).read_text().splitlines())) for name in ("metrics_part_1.csv", "metrics.csv")
    ]
    assert [float(row["step"]) for part in rows for row in part if row["train/loss"]] == [1, 2, 3, 4]
    # offline-run-TIME-ID, and `-1` where two have the same second.
    ids = [path.name.split("-")[3] for path in Path("logs/wandb").glob("offline-run-*")]
    assert len(ids) == 2
    assert len(set(ids)) == 1


@pytest.mark.parametrize("name", ["TensorBoard", "CSV", "W&B", "none"])
def test_default_root_dir_moves_everything(work, name):
    settings = LOGGERS[name][0] | {"trainer.default_root_dir": work / "elsewhere", "trainer.max_steps": 1}
    run_command(words(work, **settings))
    finish()
    assert list(Path.cwd().iterdir()) == []
    assert len(list((work / "elsewhere").rglob("last.ckpt"))) == 1
    run_command(words(work, **(settings | {"trainer.max_steps": 2}), ckpt_path="last"))
    finish()
    assert len(list((work / "elsewhere").rglob("last.ckpt"))) == 1
    assert list(Path.cwd().iterdir()) == []


def test_a_version_that_is_another_run_s_is_refused(work):
    settings = LOGGERS["TensorBoard"][0] | {"trainer.logger.version": 0, "trainer.max_steps": 1}
    run_command(words(work, **settings))
    (run,) = Path("logs/x").iterdir()  # version_0; 0 where jsonargparse reads a text (Python 3.14)
    with pytest.raises(SettingsError, match=f"`version` of the logger is '?0'?, but {run} holds another run"):
        run_command(words(work, **settings))
    run_command(words(work, **(settings | {"trainer.max_steps": 2}), ckpt_path=run / "checkpoints" / "last.ckpt"))
    shutil.rmtree("logs")
    run_command(words(work, **settings))


@pytest.mark.parametrize("name", ["Lightning's default", "TensorBoard", "CSV"])
def test_runs_that_begin_together_have_folders_of_their_own(work, monkeypatch, name):
    """The second begins and ends while the first reads its data; it used to find the same number for its folder."""
    settings, folder, _ = LOGGERS[name]
    command, begun = words(work, **settings, **{"trainer.max_steps": 2}), []
    prepare = SFTDataModule.prepare_data

    def prepare_slowly(self):
        begun.append(self)
        if len(begun) == 1:
            run_command([*command, "--trainer.max_steps", "1"])
        prepare(self)

    monkeypatch.setattr(SFTDataModule, "prepare_data", prepare_slowly)
    run_command(command)
    assert runs_in(folder) == {Path.cwd() / folder / f"version_{i}": 2 - i for i in (0, 1)}


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK"])
def test_only_the_first_process_makes_a_folder_also_if_it_was_forked_from_another(tmp_path, monkeypatch, variable):
    """One that imported Lightning, which reads these variables once, before they were set."""
    monkeypatch.setenv(variable, "1")
    assert ClaimedFolders().claim(tmp_path) is None
    monkeypatch.setenv(variable, "0")
    assert ClaimedFolders().claim(tmp_path) == 0


@pytest.mark.parametrize("wrong", [{"model.lr_scheduler": "x"}, {"data.train_data": "missing.jsonl"}])
def test_a_command_that_is_refused_leaves_no_folder(work, wrong):
    with pytest.raises(SettingsError):
        run_command(words(work, **wrong))
    assert not list(Path.cwd().iterdir())


@pytest.fixture
def in_job(monkeypatch):
    """Let this be a process of a job, as `srun` starts it."""
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "train")

    def begin(job, step=0, restarts=None):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        if restarts is not None:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))

    return begin


def test_a_job_that_slurm_starts_again_goes_on_with_its_own_run(work, in_job):
    """Neither with the newest one nor with what it began from, and not with that of another step of its script."""
    runs = [Path.cwd() / f"lightning_logs/version_{i}" for i in range(4)]
    for number, (job, step) in enumerate([(12, 0), (12, 1), (13, 0)]):
        in_job(job, step)
        run_command(words(work, **{"trainer.max_steps": number + 1}))
    for beginning in ({"init_from": runs[2] / "checkpoints" / "last.ckpt"}, {"ckpt_path": "last"}):
        in_job(12, 1, restarts=1)
        run_command(words(work, **beginning, **{"trainer.max_steps": 5}))
        assert runs_in("lightning_logs") == {runs[0]: 1, runs[1]: 5, runs[2]: 3}
    in_job(14, restarts=1)  # it had saved nothing
    run_command(words(work, **{"trainer.max_steps": 1}))
    assert runs_in("lightning_logs") == {runs[0]: 1, runs[1]: 5, runs[2]: 3, runs[3]: 1}


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_job_is_not_started_from_unasked(work, in_job, command):
    in_job(12)
    Path("hpc_ckpt_1.ckpt").touch()
    with pytest.raises(SettingsError, match=r"There is hpc_ckpt_1\.ckpt, which Lightning loads under SLURM"):
        run_command(words(work, command))
