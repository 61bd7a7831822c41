"""`GenerationMonitor` in real runs."""

import json

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from support.callbacks import ROWS, fit
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sft import GenerationMonitor, LastCheckpoint, Sampling, SFTDataModule, SFTModule
from lightning_sft.callbacks import generation_monitor

KEYS = {"step", "prompt", "response", "ground_truth", "format_reward", "answer_reward", "reward", "token_entropy"}


def by_length(response, ground_truth):
    return {"format_reward": 1.0, "answer_reward": float(len(response) % 2), "reward": 0.25}


def make_monitor(**changes):
    return GenerationMonitor(**({"reward_fn": by_length, "num_prompts": 3, "sampling": Sampling(5)} | changes))


def test_training_with_and_without_the_monitor_gives_identical_weights(tmp_path):
    monitor = make_monitor(every_n_steps=1, sampling=Sampling(5, temperature=1.0))
    watched, _ = fit(tmp_path, [monitor], dropout=0.3)
    alone, _ = fit(tmp_path, [], dropout=0.3)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    modes = [{module.training for module in run.model.modules()} for run in (watched, alone)]
    assert modes == [{True}, {True}]


def test_without_prompts_only_test_generates(tmp_path):
    data = SFTDataModule(character_tokenizer(), ROWS, ROWS[:5], test_data=ROWS[:2])
    module, trainer = fit(tmp_path, [make_monitor(num_prompts=0)], data=data, max_steps=1)
    assert "val/loss" in trainer.callback_metrics
    assert "val/reward" not in trainer.callback_metrics
    assert not list(tmp_path.rglob("generations"))
    (metrics,) = trainer.test(module, data, verbose=False)
    assert metrics["test/num_responses"] == 2


def test_each_generation_writes_its_lines_table_and_scalars(tmp_path):
    _, trainer = fit(tmp_path, [make_monitor(every_n_steps=2)], TensorBoardLogger(tmp_path))
    folder = tmp_path / "lightning_logs" / "version_0"
    steps = [0, 2, 3, 4, 6]  # before training, every second step, and at validation
    names = {file.name for file in (folder / "generations").iterdir()}
    assert names == {f"step_{step}.{kind}" for step in steps for kind in ("jsonl", "html")} | {"index.html"}
    files = sorted((folder / "generations").glob("*.jsonl"))
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["q0", "q1", "q2"]
    assert {line["step"] for line in lines} == {2}
    assert all(line.keys() >= KEYS | {"response_length"} for line in lines)
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()
    for name in ("reward", "answer_reward", "format_reward", "response_length", "response_entropy"):
        assert [event.step for event in events.Scalars(f"val/{name}")] == steps
    shares = {event.step: event.value for event in events.Scalars("val/answer_reward")}
    assert shares[2] == pytest.approx(sum(line["answer_reward"] for line in lines) / 3)
    assert {"val/response_length_correct", "val/response_length_incorrect"} & set(events.Tags()["scalars"])
    assert [event.step for event in events.Tensors("generations/text_summary")] == steps
    by_correctness = [f"generations/response_length_{name}" for name in ("correct", "incorrect")]
    counts = [histogram.histogram_value.num for tag in by_correctness for histogram in events.Histograms(tag)]
    assert sum(counts) == 3 * len(steps)
    num_tokens = sum(line["response_length"] for line in lines)
    for name, of_line in {"token_entropy": "token_entropies", "token_log_prob": "token_log_probs"}.items():
        (histogram,) = [each for each in events.Histograms(f"generations/{name}") if each.step == 2]
        assert histogram.histogram_value.num == num_tokens
        values = [value for line in lines for value in line[of_line]]
        assert histogram.histogram_value.sum == pytest.approx(sum(values), abs=1e-4 * num_tokens)
    seconds, shares_of_time = (
        [event.value for event in events.Scalars(f"val/generation_{name}")] for name in ("seconds", "share")
    )
    assert all(0 < share < 1 for share in shares_of_time)
    assert len(seconds) == len(steps)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val/loss")] == [3, 6]
    assert trainer.callback_metrics["val/answer_reward"].item() == shares[6]


def test_a_step_that_is_also_validated_is_generated_for_once(tmp_path):
    scored = []

    def counting(response, ground_truth):
        scored.append(ground_truth)
        return by_length(response, ground_truth)

    fit(tmp_path, [make_monitor(reward_fn=counting, every_n_steps=1)])
    assert scored == ["g0", "g1", "g2"] * (1 + 6)


def test_without_validation_rows_the_prompts_are_training_rows(tmp_path, capsys):
    fit(tmp_path, [make_monitor(every_n_steps=3)], data=SFTDataModule(character_tokenizer(), ROWS, batch_size=4))
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["step 0:", "step 3:", "step 6:"]
    first = json.loads((tmp_path / "generations" / "step_0.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "q0"


def test_a_failing_reward_is_shown_and_training_goes_on(tmp_path):
    def broken(response, ground_truth):
        raise KeyError("verifier")

    with pytest.warns(UserWarning, match=r"reward function failed on 3 of 3 examples.*KeyError: 'verifier'.*q0"):
        _, trainer = fit(tmp_path, [make_monitor(reward_fn=broken)])
    assert trainer.global_step == 6
    assert trainer.callback_metrics["val/reward_failures"] == 3


def test_test_reports_loss_and_rewards_over_all_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generation_monitor, "_PROMPTS_AT_ONCE", 5)

    def every_third(response, ground_truth):
        return dict.fromkeys(("format_reward", "answer_reward", "reward"), float(int(ground_truth[1:]) % 3 == 0))

    module = SFTModule(tiny_model())
    data = SFTDataModule(character_tokenizer(), test_data=ROWS, batch_size=4)
    trainer = make_trainer(tmp_path, callbacks=[make_monitor(reward_fn=every_third)])
    (metrics,) = trainer.test(module, data, verbose=False)
    lines = [json.loads(line) for line in (tmp_path / "generations" / "test_step_0.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(12))
    assert (metrics["test/num_correct"], metrics["test/num_responses"]) == (4, 12)
    assert 0 < metrics["test/answer_reward_low"] < 4 / 12 < metrics["test/answer_reward_high"] < 1
    told = capsys.readouterr().out
    assert "4 of 12 correct; answer_reward 0.3333, 95% bootstrap interval" in told
    assert metrics.keys() >= {"test/loss", "test/perplexity", "test/token_accuracy", "test/answer_reward"}
    assert all(len(line["tokens"]) == line["response_length"] > 0 for line in lines)
    assert (tmp_path / "generations" / "test_step_0.html").is_file()


def test_test_generates_for_the_rows_that_it_evaluates(tmp_path):
    data = SFTDataModule(character_tokenizer(), test_data=ROWS, batch_size=4)
    trainer = make_trainer(tmp_path, callbacks=[make_monitor()], limit_test_batches=2)
    (metrics,) = trainer.test(SFTModule(tiny_model()), data, verbose=False)
    assert metrics["test/num_responses"] == 8


def test_two_monitors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two `GenerationMonitor`s, which would write the same files"):
        fit(tmp_path, [make_monitor(), make_monitor(num_prompts=3)])


def test_fast_dev_run_generates_but_writes_nothing(tmp_path):
    fit(tmp_path, [make_monitor(), LastCheckpoint()], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_monitor_without_an_sft_datamodule_says_so(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[make_monitor()])
    with pytest.raises(ValueError, match="`GenerationMonitor` takes its prompts from an `SFTDataModule`"):
        trainer.validate(SFTModule(tiny_model()), torch.utils.data.DataLoader([1]))


def test_a_monitor_without_an_sft_module_says_so(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[make_monitor()])
    with pytest.raises(ValueError, match="`GenerationMonitor` generates with an `SFTModule`"):
        trainer.validate(BoringModel(), SFTDataModule(character_tokenizer(), ROWS, ROWS[:5]))


@pytest.mark.parametrize("name", ["every_n_steps", "max_tokens_per_batch"])
def test_bad_numbers_are_named(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, expected at least 1"):
        GenerationMonitor(**{name: 0})
