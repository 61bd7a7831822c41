"""Rows in the forms of other programs, from their file to what a model answers, on the command line."""

import json
from itertools import chain
from pathlib import Path

import pytest
import yaml
from support.chat import CHATML, chat_tokenizer
from support.models import character_tokenizer, tiny_config, tiny_model

from lightning_sft.cli.app import run_command

ROWS = [{"instruction": f"{n}+{n}?", "output": f"{2 * n}.", "system": "Be brief."} for n in range(9)]


@pytest.mark.parametrize(
    "how",
    [
        ["--data.row_transform", "lightning_sft.alpaca_row"],
        ["--data.as_chat", "true", "--data.prompt_field", "instruction"],
    ],
    ids=["transform", "as_chat"],
)
def test_instructions_teach_an_instruct_model_in_its_own_format_and_bad_rows_are_left_out(
    how, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer(CHATML)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained("model")
    tokenizer.save_pretrained("model")
    lines = [json.dumps(row) for row in ROWS]
    Path("rows.jsonl").write_text("\n".join([lines[0], lines[1][:9], *lines[1:], '{"instruction": "?", "output": 3}']))
    Path("prompts.jsonl").write_text('{"instruction": "Who?"}\n{"question": "Who?"}\n')
    words = [*how, "--model.model", "model", "--data.bad_rows", "drop", "--data.batch_size", "4"]
    words += ["--data.train_data", "rows.jsonl", "--data.val_data", "rows.jsonl", "--trainer.max_steps", "2"]
    words += ["--generation.num_prompts", "1", "--generation.sampling.max_new_tokens", "3"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "CSVLogger"]
    cli = run_command(["fit", *words, "--trainer.logger.save_dir", "runs", "--trainer.log_every_n_steps", "1"])
    assert cli.datamodule.facts()["data"]["train rows"] == 9
    assert "train_data: left out 2 of 11 rows that cannot be used (`bad_rows` is 'drop')." in caplog.text
    assert "1 row, line 2: not valid JSON" in caplog.text

    run = Path(cli.trainer.log_dir)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n0+0?<|im_end|>\n<|im_start|>assistant\n"
    (record,) = map(json.loads, (run / "generations" / "step_2.jsonl").read_text().splitlines())
    assert (record["prompt"], record["ground_truth"]) == (prompt, "0.")

    saved = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    run_command(
        ["predict", *saved, "--data.predict_data", "prompts.jsonl", "--generation.predict_path", "answers.jsonl"]
    )
    (answer,) = map(json.loads, Path("answers.jsonl").read_text().splitlines())
    assert answer["prompt"] == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert "predict_data: left out 1 of 2 rows that cannot be used" in caplog.text


def test_the_saved_settings_of_a_mix_and_of_named_sets_are_those_that_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text(json.dumps({"prompt": name, "output": "c"}))
    data = {"train_data": {"a.jsonl": 2, "b.jsonl": 1}, "val_data": {"a": "a.jsonl", "b": ["b.jsonl"]}}
    character_tokenizer().save_pretrained("tokenizer")
    words = ["--model.model", json.dumps(tiny_config()), "--data.tokenizer", "tokenizer", "--trainer.max_steps", "1"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--generation.num_prompts", "0"]
    cli = run_command(["fit", *words, *chain(*((f"--data.{name}", json.dumps(of)) for name, of in data.items()))])
    run = Path(cli.trainer.log_dir)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert {name: saved["data"][name] for name in data} == data
    cli = run_command(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", "last"])
    assert {"val/loss", "val/a/loss", "val/b/loss"} < set(cli.trainer.callback_metrics)
