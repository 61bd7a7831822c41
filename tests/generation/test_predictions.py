"""`predict`: every response once in the file, whatever interrupts it and however many processes share the work."""

import json
import os
from functools import partial

import lightning as L
import pytest
import torch
from support.models import character_tokenizer, tiny_config, tiny_model
from support.processes import Processes
from support.runs import SHARDED, longer_length

from lightning_sft import GenerationMonitor, Sampling, SettingsError, SFTDataModule, SFTModule, log_generations
from lightning_sft.callbacks import generation_monitor
from lightning_sft.generation.generate import generate_records
from lightning_sft.generation.predictions import PredictionFile, prediction_run
from lightning_sft.generation.settings import GenerationSettings

ROWS = [{"prompt": f"p{i}" + "q" * (i % 3), "ground_truth": f"g{i}"} for i in range(7)]


class Interrupted(L.Callback):
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            raise RuntimeError("the node is gone")


def predict(folder, strategy="auto", *, path=None, seed=0, rows=ROWS, callbacks=(), fast_dev_run=False, returned=True):
    torch.set_num_threads(1)
    monitor = GenerationMonitor(
        longer_length, sampling=Sampling(max_new_tokens=5, temperature=1.0, num_samples=2), predict_path=path
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=SHARDED[strategy]() if strategy in SHARDED else strategy,
        logger=False,
        callbacks=[monitor, *callbacks],
        enable_progress_bar=False,
        fast_dev_run=fast_dev_run,
        default_root_dir=folder,
    )
    data = SFTDataModule(character_tokenizer(), predict_data=rows, batch_size=2)
    return trainer.predict(SFTModule(tiny_config(), seed=seed), data, return_predictions=returned)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def straight(tmp_path):
    path = tmp_path / "straight.jsonl"
    predict(tmp_path, path=path)
    return path


def test_a_file_below_the_home_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    predict(tmp_path, path="~/predicted.jsonl", rows=ROWS[:1])
    log_generations(tiny_model(), character_tokenizer(), ["a"], [None], sampling=Sampling(1), path="~/logged.jsonl")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"predicted.jsonl", "logged.jsonl"}


def test_predict_returns_and_writes_every_record_in_order(tmp_path, straight, capsys):
    batches = predict(tmp_path, path=tmp_path / "again.jsonl")
    records = [record for batch in batches for record in batch]
    assert [len(batch) for batch in batches] == [4, 4, 4, 2]
    expected = [(i, k, ROWS[i]["prompt"], ROWS[i]["ground_truth"]) for i in range(7) for k in range(2)]
    assert [(each.index, each.sample, each.prompt, each.ground_truth) for each in records] == expected
    lines = read(straight)
    assert [line["response"] for line in lines] == [record.response for record in records]
    assert {line["answer_reward"] for line in lines} <= {0.0, 1.0}
    assert f"Predictions: {tmp_path / 'again.jsonl'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "torn", [0, 1, 4, 40], ids=["between lines", "between two samples", "at the start of a line", "in a line"]
)
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, straight, torn, capsys):
    path = tmp_path / "new" / "predictions.jsonl"
    with pytest.raises(RuntimeError, match="the node is gone"):
        predict(tmp_path, path=path, callbacks=[Interrupted()])
    lines = straight.read_bytes().splitlines(keepends=True)
    assert path.read_bytes() == b"".join(lines[:8])  # two batches of two prompts, two samples each
    path.write_bytes(path.read_bytes() + {0: b"", 1: lines[8]}.get(torn, lines[8] + lines[9][:torn]))
    batches = predict(tmp_path, path=path)
    assert path.read_bytes() == straight.read_bytes()
    assert [record.index for batch in batches for record in batch] == [i for i in range(7) for _ in range(2)]
    assert "has 4 of 7 prompts; continuing with the next" in capsys.readouterr().out
    predict(tmp_path, path=path)  # nothing is left to do
    assert path.read_bytes() == straight.read_bytes()


def test_records_that_are_not_returned_are_written_all_the_same_and_none_is_generated_twice(
    tmp_path, straight, monkeypatch
):
    path, generated = tmp_path / "new.jsonl", []

    def watched(model, tokenizer, prompts, *args, **kwargs):
        generated.extend(prompt.index for prompt in prompts)
        return generate_records(model, tokenizer, prompts, *args, **kwargs)

    monkeypatch.setattr(generation_monitor, "generate_records", watched)
    with pytest.raises(RuntimeError, match="the node is gone"):
        predict(tmp_path, path=path, callbacks=[Interrupted()], returned=False)
    assert predict(tmp_path, path=path, returned=False) is None
    assert generated == [0, 1, 2, 3, 4, 5, 6]
    assert path.read_bytes() == straight.read_bytes()


def test_records_of_another_run_are_never_mixed_with_these_nor_lost(tmp_path, straight):
    before = straight.read_bytes()
    for changes in ({"seed": 1}, {"rows": ROWS[1:]}):
        with pytest.raises(ValueError, match=r"`predict_path` is .* it holds those of other prompts, weights, rewards"):
            predict(tmp_path, path=straight, **changes)
    assert straight.read_bytes() == before
    lines = before.splitlines(keepends=True)
    straight.write_bytes(lines[0] + lines[2])
    with pytest.raises(ValueError, match="line 2 is of prompt 1, expected 0"):
        predict(tmp_path, path=straight)
    straight.write_bytes(lines[0] + b"mine\n")
    with pytest.raises(ValueError, match="line 2 is 'mine"):
        predict(tmp_path, path=straight)
    assert straight.read_bytes() == lines[0] + b"mine\n"
    straight.write_bytes(b'{"answers": [1, 2]}')  # one line, without an end: not one that was broken off
    with pytest.raises(ValueError, match=r"line 1 is '\{"):
        predict(tmp_path, path=straight)
    assert straight.read_bytes() == b'{"answers": [1, 2]}'


def test_without_a_path_each_run_has_a_file_of_its_own(tmp_path, straight):
    for seed in (0, 1, 0):
        predict(tmp_path, seed=seed)
    files = list((tmp_path / "predictions").iterdir())
    assert len(files) == 2
    assert straight.read_bytes() in [file.read_bytes() for file in files]


def test_a_reward_function_that_is_written_anew_is_another_run():
    """As in a notebook, under the same name, and with other arguments."""

    def reward_fn(response, ground_truth, *, least=0):
        return dict.fromkeys(("format_reward", "answer_reward", "reward"), float(len(response) > least))

    first = reward_fn

    def reward_fn(response, ground_truth, *, least=0):
        return dict.fromkeys(("format_reward", "answer_reward", "reward"), 1.0)

    functions = [first, reward_fn, partial(first, least=1), partial(first, least=2)]
    model = tiny_model()
    twice = [[prediction_run(model, [], GenerationSettings(each, Sampling())) for each in functions] for _ in range(2)]
    assert twice[0] == twice[1]
    assert len(set(twice[0])) == 4
    made_anew = [GenerationSettings(partial(first, least=object()), Sampling()) for _ in range(2)]
    assert prediction_run(model, [], made_anew[0]) == prediction_run(model, [], made_anew[1])


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_generated(tmp_path):
    (tmp_path / "file").touch()
    for path, problem in ((tmp_path, "that is a folder"), (tmp_path / "file" / "a.jsonl", ".*/file is a file")):
        with pytest.raises(SettingsError, match=f"`predict_path` is '.*', but {problem}"):
            PredictionFile(path, "run").resume()


def test_a_fast_dev_run_predicts_and_writes_nothing(tmp_path):
    (batch,) = predict(tmp_path, fast_dev_run=True)
    assert [record.index for record in batch] == [0, 0, 1, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_write_what_one_does(tmp_path, straight, strategy):
    path = tmp_path / "two.jsonl"
    assert Processes(predict, tmp_path, strategy, path=path, world_size=2).wait() == [0, 0]
    for ours, theirs in zip(read(path), read(straight), strict=True):
        for name in ("token_entropy", "token_log_probs", "token_entropies"):  # rounding
            assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=2e-4)
        assert ours == theirs
