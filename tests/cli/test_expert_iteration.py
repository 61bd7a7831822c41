"""A round of expert iteration on the command line: a model answers problems, and learns what it got right."""

import json
from pathlib import Path

import pytest

from lightning_sft.cli.app import run_command


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """The folder of a run of the quickstart, of a few steps."""
    monkeypatch.chdir(tmp_path)
    words = {"data.train_data.init_args.num_rows": 64, "data.val_data.init_args.num_rows": 8, "export.folder": "null"}
    run_command(["fit", "--config", "quickstart", *quick(2), *(f"--{name}={value}" for name, value in words.items())])
    return Path("runs/quickstart/version_0")


def quick(max_steps):
    words = {"trainer.max_steps": max_steps, "trainer.val_check_interval": 1.0, "generation.num_prompts": 2}
    words |= {"trainer.enable_progress_bar": "false", "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1}
    return [f"--{name}={value}" for name, value in words.items()]


def test_a_round_predicts_chooses_and_trains_from_the_weights_before(start, capsys):
    checkpoint = str(start / "checkpoints" / "last.ckpt")
    words = ["--config", str(start / "config.yaml"), "--config", "expert_iteration"]
    options = ["--data.predict_data.init_args.num_rows", "12", "--generation.predict_path", "round_1/records.jsonl"]
    run_command(["predict", *words, *options, "--ckpt_path", checkpoint])
    records = lines("round_1/records.jsonl")
    assert [(record["index"], record["sample"]) for record in records] == [(i, j) for i in range(12) for j in range(8)]
    chosen = ["--records", "round_1/records.jsonl", "--output", "round_1/rows.jsonl", "--min_reward", "0"]
    run_command(["best_responses", *chosen, "--per_prompt", "2"])
    rows = lines("round_1/rows.jsonl")
    assert {row["prompt"] for row in rows} <= {record["prompt"] for record in records}
    options = ["--data.train_data", "round_1/rows.jsonl", "--init_from", checkpoint, "--export.folder=null"]
    cli = run_command(["fit", *words, *options, *quick(3)])
    assert cli.trainer.global_step == 3
    assert cli.datamodule.facts()["data"]["train rows"] == len(rows)
    assert cli.trainer.log_dir != str(start)
