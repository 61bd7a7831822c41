"""A run read from its folder, whatever logger has written its metrics."""

import json

import lightning as L
import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from support.models import character_tokenizer, tiny_config

from lightning_sft import GenerationMonitor, Sampling, SettingsError, SFTDataModule, SFTModule, read_run
from lightning_sft.errors import MissingFileError
from lightning_sft.results.finished_run import FinishedRun
from lightning_sft.training.run_folder import run_folder

ROWS = [{"prompt": f"q{i}", "output": "ab" * (1 + i % 3), "ground_truth": "b"} for i in range(12)]
LOGGERS = {
    "CSV": CSVLogger,
    "TensorBoard": TensorBoardLogger,
    "MLflow": lambda folder: MLFlowLogger(save_dir=str(folder)),
    "W&B": lambda folder: WandbLogger(save_dir=folder, offline=True),
    "none": lambda folder: False,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a run of four steps with a logger; returns its folder and the metrics that it was told of."""
    for name in ("WANDB_SILENT", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")

    def make(kind):
        told = []
        logger = LOGGERS[kind](tmp_path / "logs")
        if logger:
            log = logger.log_metrics

            def log_metrics(metrics, step=None):
                if "hp_metric" not in metrics:  # which TensorBoard's logger makes up
                    told.append((step, dict(metrics)))
                return log(metrics, step)

            monkeypatch.setattr(logger, "log_metrics", log_metrics)
        monitor = GenerationMonitor(num_prompts=2, sampling=Sampling(max_new_tokens=3, temperature=1.0, num_samples=2))
        trainer = L.Trainer(
            accelerator="cpu",
            logger=logger,
            max_steps=4,
            val_check_interval=2,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            default_root_dir=tmp_path / "root",
            callbacks=[monitor],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(SFTModule(tiny_config()), SFTDataModule(character_tokenizer(), ROWS, ROWS[:4], batch_size=4))
        if kind == "W&B":
            import wandb  # takes two seconds

            wandb.finish()
        return run_folder(trainer), told

    return make


@pytest.mark.parametrize("kind", ["CSV", "TensorBoard", "MLflow"])
def test_metrics_are_those_that_the_logger_was_told_of(run, kind):
    folder, told = run(kind)
    metrics = read_run(folder).metrics
    assert {"train/loss", "val/loss", "val/answer_reward", "train/grad_norm"} <= set(metrics.columns)
    expected = {}
    for step, values in told:
        expected.setdefault(step, {}).update(values)
    assert list(metrics.index) == sorted(expected)
    for step, values in expected.items():
        for name, value in values.items():
            assert metrics.loc[step, name] == pytest.approx(float(value), rel=1e-6, nan_ok=True), (step, name)
    assert metrics["val/loss"].notna().sum() == 2


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("none", "It had no logger, or one that keeps them elsewhere."), ("W&B", "Weights & Biases has them in its own")],
)
def test_metrics_that_cannot_be_read_are_told_and_all_else_is_read(run, kind, reason):
    folder, _ = run(kind)
    finished = read_run(folder)
    with pytest.raises(SettingsError, match=f"has no metrics that can be read. {reason}.*`CSVLogger`"):
        _ = finished.metrics
    assert finished.generation_steps == [0, 2, 4]


def test_records_are_those_of_the_files_and_a_table_has_them_all(run):
    folder, _ = run("CSV")
    finished = read_run(str(folder))
    lines = [json.loads(line) for line in (folder / "generations" / "step_4.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("step") == 4
    assert [record.to_json() for record in finished.records()] == lines
    table = finished.generations
    assert list(table.index) == [(step, index, sample) for step in (0, 2, 4) for index in (0, 1) for sample in (0, 1)]
    assert list(table.loc[4]["response"]) == [line["response"] for line in lines]
    assert "token_ids" not in table
    with pytest.raises(SettingsError, match=r"no generations of step 3; the steps that have some: 0, 2, 4\.$"):
        finished.records(3)


def test_settings_are_those_of_the_command_line_or_else_of_the_logger(run, tmp_path):
    folder, _ = run("TensorBoard")
    assert read_run(folder).settings["data.batch_size"] == 4
    (folder / "config.yaml").write_text("data:\n  batch_size: 8\n")
    assert read_run(folder).settings == {"data": {"batch_size": 8}}


def test_settings_that_cannot_be_read_leave_the_metrics_readable(tmp_path):
    """Lightning writes hyperparameters of a user's own class as Python's YAML has them."""
    (tmp_path / "hparams.yaml").write_text("betas: !!python/tuple [0.9, 0.99]\n")
    (tmp_path / "metrics.csv").write_text("step,a\n1,2.0\n")
    run = read_run(tmp_path)
    assert run.metrics.loc[1, "a"] == 2.0
    with pytest.raises(SettingsError, match=r"hparams.yaml cannot be read: could not determine a constructor"):
        _ = run.settings


def test_of_a_csv_file_with_a_step_in_several_lines_each_metric_has_its_last_value(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a,b\n2,1.0,\n2,,5.0\n4,3.0,\n2,,6.0\n")
    expected = pd.DataFrame({"a": [1.0, 3.0], "b": [6.0, None]}, index=pd.Index([2, 4], name="step"))
    pd.testing.assert_frame_equal(read_run(tmp_path).metrics, expected)


def test_a_csv_file_in_parts_is_one_table_in_which_the_later_numbers_count(tmp_path):
    """A run that continues begins another file; here at step 4, where it comes to other numbers."""
    (tmp_path / "metrics_part_2.csv").write_text("step,a,b\n4,4.5,\n")
    (tmp_path / "metrics_part_1.csv").write_text("step,a,b\n2,2.0,\n4,4.0,\n4,,8.0\n6,6.0,\n")
    (tmp_path / "metrics.csv").write_text("step,a,c\n8,8.0,1.0\n")
    expected = {"a": [2.0, 4.5, 8.0], "b": [None, 8.0, None], "c": [None, None, 1.0]}
    table = pd.DataFrame(expected, index=pd.Index([2, 4, 8], name="step"))
    pd.testing.assert_frame_equal(read_run(tmp_path).metrics, table)


def test_a_line_that_is_still_being_written_is_left_out_and_another_one_is_named(run):
    folder, _ = run("none")
    path = folder / "generations" / "step_4.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "pro')
    assert len(read_run(folder).records(4)) == 4
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(SettingsError, match=r"^line 5 of .*step_4.jsonl is not a record of a generation: "):
        read_run(folder).records(4)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(MissingFileError, match="`folder` is 'none', but there is no such folder"):
        read_run("none")
    with pytest.raises(SettingsError, match=r"which has no settings, metrics or generations\.$"):
        read_run(tmp_path)
    (tmp_path / "x" / "version_0").mkdir(parents=True)
    (tmp_path / "x" / "version_0" / "hparams.yaml").write_text("a: 1\n")
    with pytest.raises(SettingsError, match=r"generations\. Below it is .*x/version_0\.$"):
        read_run(tmp_path)
    with pytest.raises(SettingsError, match="`folder` is 3 of type int, expected the folder of a run"):
        read_run(3)


@pytest.mark.parametrize(
    ("name", "content", "read", "message"),
    [
        ("metrics.csv", b"", lambda run: run.metrics, "metrics.csv cannot be read: No columns to parse from file"),
        ("metrics.csv", b"loss\n1\n", lambda run: run.metrics, "metrics.csv cannot be read: 'step'"),
        ("metrics/loss", b"1 x 4\n", lambda run: run.metrics, "metrics/loss cannot be read: could not convert"),
        ("hparams.yaml", b"- a\n", lambda run: run.settings, "hparams.yaml cannot be read: it holds .'a'., expected"),
        (
            "generations/step_1.jsonl",
            b"\xff\n",
            lambda run: run.records(),
            "step_1.jsonl cannot be read: 'utf-8' codec",
        ),
    ],
)
def test_a_file_that_is_cut_short_or_something_else_is_named(tmp_path, name, content, read, message):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read(FinishedRun(tmp_path))
