"""`GenerationMonitor` and `LastCheckpoint` in real runs."""

import csv
import io
import json
import math
import warnings

import lightning as L
import pytest
import rich.console
import torch
from lightning.pytorch.callbacks.progress.rich_progress import CustomProgress
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.models import character_tokenizer, tiny_config, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sft import (
    GenerationMonitor,
    LastCheckpoint,
    Sampling,
    SFTDataModule,
    SFTModule,
    StepProgressBar,
    TokenThroughput,
)
from lightning_sft.callbacks import generation_monitor
from lightning_sft.callbacks.throughput import _DeviceTimer, known_peak_flops
from lightning_sft.generation.records import GenerationRecord
from lightning_sft.generation.report.loggers import log_records, markdown_table, print_records
from lightning_sft.model.flops import training_flops
from lightning_sft.model.precision import Precision

ROWS = [{"prompt": f"q{i}", "output": "abc" * (1 + i % 3), "ground_truth": f"g{i}"} for i in range(12)]
KEYS = {"step", "prompt", "response", "ground_truth", "format_reward", "answer_reward", "reward", "token_entropy"}


def by_length(response, ground_truth):
    return {"format_reward": 1.0, "answer_reward": float(len(response) % 2), "reward": 0.25}


def make_monitor(**changes):
    return GenerationMonitor(**({"reward_fn": by_length, "num_prompts": 3, "sampling": Sampling(5)} | changes))


def fit(folder, callbacks, logger=False, data=None, dropout=0.0, **options):
    module = SFTModule(tiny_config(attention_dropout=dropout), optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    data = data or SFTDataModule(character_tokenizer(), ROWS, ROWS[:5], batch_size=4)
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "logger": logger,
            "callbacks": callbacks,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, LastCheckpoint) for callback in callbacks),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            "max_epochs": 2,
        }
        | options
    )
    trainer.fit(module, data)
    return module, trainer


def test_training_with_and_without_the_monitor_gives_identical_weights(tmp_path):
    monitor = make_monitor(every_n_steps=1, sampling=Sampling(5, temperature=1.0))
    watched, _ = fit(tmp_path, [monitor], dropout=0.3)
    alone, _ = fit(tmp_path, [], dropout=0.3)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))
    modes = [{module.training for module in run.model.modules()} for run in (watched, alone)]
    assert modes == [{True}, {True}]


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
    monitor, calls = make_monitor(every_n_steps=1), []
    generate = monitor._generate
    monitor._generate = lambda *args: calls.append(1) or generate(*args)
    fit(tmp_path, [monitor])
    assert len(calls) == 1 + 6


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
    monkeypatch.setattr(generation_monitor, "_AT_ONCE", 5)  # prompts
    monkeypatch.setattr(generation_monitor, "_KEPT_WHOLE", 7)  # records

    def every_third(response, ground_truth):
        return dict.fromkeys(("format_reward", "answer_reward", "reward"), float(int(ground_truth[1:]) % 3 == 0))

    module = SFTModule(tiny_model())
    data = SFTDataModule(character_tokenizer(), test_data=ROWS, batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[make_monitor(reward_fn=every_third)],
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    monitor, parts = trainer.callbacks[0], []
    generate = monitor._generate
    monitor._generate = lambda *args: parts.append(generate(*args)) or parts[-1]
    (metrics,) = trainer.test(module, data, verbose=False)
    assert [bool(record.tokens) for part in parts for record in part] == [True] * 7 + [False] * 5  # in memory
    lines = [json.loads(line) for line in (tmp_path / "generations" / "test_step_0.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(12))
    assert (metrics["test/num_correct"], metrics["test/num_responses"]) == (4, 12)
    assert 0 < metrics["test/answer_reward_low"] < 4 / 12 < metrics["test/answer_reward_high"] < 1
    told = capsys.readouterr().out
    assert "4 of 12 correct; answer_reward 0.3333, 95% bootstrap interval" in told
    assert metrics.keys() >= {"test/loss", "test/perplexity", "test/token_accuracy", "test/answer_reward"}
    assert all(len(line["tokens"]) == line["response_length"] > 0 for line in lines)
    assert (tmp_path / "generations" / "test_step_0.html").is_file()


def test_fast_dev_run_generates_but_writes_nothing(tmp_path):
    fit(tmp_path, [make_monitor(), LastCheckpoint()], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_monitor_without_an_sft_datamodule_says_so(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[make_monitor()], max_steps=1)
    with pytest.raises(ValueError, match="`GenerationMonitor` takes its prompts from an `SFTDataModule`"):
        trainer.validate(SFTModule(tiny_model()), torch.utils.data.DataLoader([1]))


def test_table_cells_are_escaped_and_long_texts_cut():
    unscored = GenerationRecord("p" * 700, "a|b\n<script>*x*", None, None, None, None, 0.5, 3, "eos")
    scored = GenerationRecord("p", "r", "g|h", 1.0, 0.0, 0.25, 0.5, 3, "length")
    _, header, rule, first, second = markdown_table([unscored, scored]).split("\n")
    assert {line.count("|") for line in (header, rule, first, second)} == {4}
    assert "a&#124;b<br>&#60;script&#62;&#42;x&#42;" in first
    assert "… " + "p" * 600 + " |" in first
    assert first.endswith("| 3 tokens; 0.500 nats; ended by eos |")
    assert "reward 0.25 (format 1, answer 0); expected g&#124;h; 3 tokens" in second


def test_a_logger_with_tables_gets_one():
    class Tables(CSVLogger):
        def log_table(self, key, columns=None, data=None, dataframe=None, step=None):  # as Weights & Biases' does
            self.table = (key, step, [dict(zip(columns, row, strict=True)) for row in data])

    logger = Tables("unused")
    records = [GenerationRecord(f"p{i}", "r", "g", 1.0, 0.0, 0.25, 0.5, 3, "eos") for i in range(3)]
    log_records(logger, 7, records, num_rows=2)
    key, step, rows = logger.table
    assert (key, step) == ("generations", 7)
    assert [row["prompt"] for row in rows] == ["p0", "p1"]
    assert rows[0]["reward"] == 0.25


def test_the_terminal_shows_a_small_table_and_other_outputs_nothing(monkeypatch):
    records = [GenerationRecord("p" * 300, "[red]r\n[/red]", "g", 1.0, 1.0, 0.25, 0.5, 37, "eos")]
    shown = {}
    for terminal in (True, False):
        console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
        monkeypatch.setattr(rich, "get_console", lambda console=console: console)
        print_records(records)
        shown[terminal] = console.file.getvalue()
    assert shown[False] == ""
    assert shown[True].count("p") == 80 + 4  # and those of the header
    for text in ("[red]r [/red]", "0.25", "37"):
        assert text in shown[True]


def test_a_generation_that_takes_long_has_a_line_in_the_progress_bar(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_sft.callbacks.progress_bar.time.perf_counter", lambda: now[0])
    bar = StepProgressBar()
    bar.progress = CustomProgress(disable=True)
    with bar.task("Generating") as show:
        show(0.1)
        assert bar.progress.tasks == []
        now[0] = 3.0
        show(0.25)
        (task,) = bar.progress.tasks
        assert (task.completed, task.total) == (25, 100)
    assert bar.progress.tasks == []


def test_the_last_checkpoint_is_the_last_step_even_where_nothing_validates(tmp_path):
    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)
    _, trainer = fit(tmp_path, [LastCheckpoint(every_n_steps=2)], data=data, max_steps=5)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == trainer.global_step == 5


def test_a_callback_that_is_used_again_saves_again(tmp_path):
    data, callback = SFTDataModule(character_tokenizer(), ROWS, batch_size=4), LastCheckpoint()
    for name in ("first", "second"):
        fit(tmp_path / name, [callback], data=data, max_steps=2)
        assert (tmp_path / name / "checkpoints" / "last.ckpt").is_file()


def test_throughput_counts_real_tokens(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("lightning_sft.callbacks.throughput.time.perf_counter", lambda: next(clock))
    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=12)
    fit(tmp_path, [TokenThroughput()], CSVLogger(tmp_path), data, max_steps=1)
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    num_tokens = sum(len(row["prompt"]) + len(row["output"]) for row in ROWS)  # inputs: EOS is only a label
    assert float(row["train/tokens_per_second"]) == num_tokens / 2
    assert not math.isnan(float(row["train/loss"]))


def read_csv(folder):
    with open(folder / "lightning_logs" / "version_0" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_throughput_is_averaged_from_one_logging_step_to_the_next(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("lightning_sft.callbacks.throughput.time.perf_counter", lambda: next(clock))
    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)  # in one order, three steps an epoch
    options = {"max_steps": 6, "log_every_n_steps": 3}
    fit(tmp_path, [TokenThroughput(peak_flops=1e6)], CSVLogger(tmp_path), data, **options)
    rows = [row for row in read_csv(tmp_path) if row["train/tokens_per_second"]]
    lengths = [(len(row["prompt"]), len(row["output"])) for row in ROWS]
    assert [row["step"] for row in rows] == ["3", "6"]
    for row in rows:  # each of the three steps takes two seconds
        assert float(row["train/tokens_per_second"]) == pytest.approx(sum(map(sum, lengths)) / 6)
        assert float(row["train/response_tokens_per_second"]) == pytest.approx(sum(n + 1 for _, n in lengths) / 6)
        assert float(row["train/peak_memory_gib"]) > 0.1
    # Per layer 4 attention matrices of 16 x 16 and 3 of 16 x 32; the head has 131 x 16.
    tokens, responses = sum(map(sum, lengths)), sum(n + 1 for _, n in lengths)
    pairs = sum(sum(length) * (sum(length) + 1) // 2 for length in lengths)
    flops = 6 * 2 * (4 * 16 * 16 + 3 * 16 * 32) * tokens + 6 * 131 * 16 * responses + 12 * 2 * 16 * pairs
    assert float(rows[0]["train/mfu"]) == pytest.approx(flops / 6 / 1e6, rel=1e-5)


def test_on_cuda_the_device_tells_the_time_and_is_waited_for_once(monkeypatch):
    waited, clock = [], iter([100.0, 350.0, 1000.0, 1750.0])  # milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.time = next(clock)

        def synchronize(self):
            waited.append(self.time)

        def elapsed_time(self, end):
            assert waited
            return end.time - self.time

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: None)
    timer = _DeviceTimer(torch.device("cuda"))
    for _ in range(2):
        timer.start()
        timer.stop()
    assert timer.seconds() == pytest.approx(0.25 + 0.75)
    assert waited == [1750.0]


def test_without_a_known_device_there_is_no_utilisation(tmp_path):
    fit(tmp_path, [TokenThroughput()], CSVLogger(tmp_path), max_steps=1)
    assert "train/mfu" not in read_csv(tmp_path)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_cost_nothing_unless_they_are_the_head_and_frozen_weights_need_no_gradient(tied):
    model = tiny_model(tie_word_embeddings=tied)
    totals = {"num_tokens": 10, "num_response_tokens": 4, "num_attended": 30}
    body, head = 2 * (4 * 16 * 16 + 3 * 16 * 32), 131 * 16
    assert training_flops(model, **totals) == 6 * body * 10 + 6 * head * 4 + 12 * 2 * 16 * 30
    model.requires_grad_(False)
    assert training_flops(model, **totals) == 4 * body * 10 + 4 * head * 4 + 12 * 2 * 16 * 30


def test_the_progress_bar_reads_numbers_at_logging_steps_only(tmp_path):
    """Reading one makes the host wait for the device."""
    read = []

    class Watched(StepProgressBar):
        def _read(self, trainer, pl_module):
            read.append(trainer.global_step)
            return super()._read(trainer, pl_module)

    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)
    fit(tmp_path, [Watched()], data=data, enable_progress_bar=True, max_steps=9, log_every_n_steps=4)
    assert set(read) <= {0, 1, 4, 8, 9}


def test_a_bad_peak_is_named():
    with pytest.raises(ValueError, match="`peak_flops` is 0, expected a positive number"):
        TokenThroughput(peak_flops=0)


def test_peaks_are_those_that_lightning_knows_for_sure(monkeypatch):
    known = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA L4": 121e12, "NVIDIA L40S": None, "NVIDIA Unheard-of": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, peak in known.items():
            monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
            assert known_peak_flops(torch.device("cuda"), Precision.of("bf16-mixed")) == peak


@pytest.mark.parametrize("name", ["num_prompts", "every_n_steps", "max_tokens_per_batch"])
def test_bad_numbers_are_named(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0, expected at least 1"):
        GenerationMonitor(**{name: 0})
