"""`TokenThroughput` counts real tokens, and times the steps alone."""

import contextlib
import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import ROWS, fit
from support.models import character_tokenizer

from lightning_sft import SFTDataModule, TokenThroughput
from lightning_sft.callbacks.throughput import _DeviceTimer, known_peak_flops


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
    assert [float(row["train/num_tokens"]) for row in rows] == [sum(map(sum, lengths)), 2 * sum(map(sum, lengths))]
    for row in rows:  # each of the three steps takes two seconds
        assert float(row["train/tokens_per_second"]) == pytest.approx(sum(map(sum, lengths)) / 6)
        assert float(row["train/response_tokens_per_second"]) == pytest.approx(sum(n + 1 for _, n in lengths) / 6)
        assert float(row["train/peak_memory_gib"]) > 0.1
    # Per layer 4 attention matrices of 16 x 16 and 3 of 16 x 32; the head has 131 x 16.
    tokens, responses = sum(map(sum, lengths)), sum(n + 1 for _, n in lengths)
    pairs = sum(sum(length) * (sum(length) + 1) // 2 for length in lengths)
    flops = 6 * 2 * (4 * 16 * 16 + 3 * 16 * 32) * tokens + 6 * 131 * 16 * responses + 12 * 2 * 16 * pairs
    assert float(rows[0]["train/mfu"]) == pytest.approx(flops / 6 / 1e6, rel=1e-5)


def test_tokens_are_counted_over_all_parts_of_a_run(tmp_path):
    logger, options = CSVLogger(tmp_path, version=0), {"log_every_n_steps": 2}
    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)
    _, trainer = fit(tmp_path, [TokenThroughput()], False, data, max_steps=2, **options)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, [TokenThroughput()], logger, data, max_steps=6, ckpt_path=tmp_path / "a.ckpt", **options)
    num_tokens = sum(len(row["prompt"]) + len(row["output"]) for row in ROWS)
    assert float(read_csv(tmp_path)[-1]["train/num_tokens"]) == 2 * num_tokens


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


def test_a_bad_peak_is_named():
    with pytest.raises(ValueError, match="`peak_flops` is 0, expected a positive number"):
        TokenThroughput(peak_flops=0)


def test_peaks_are_those_of_data_sheets_without_sparsity(monkeypatch):
    in_half_precision = {
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA L4": 121e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA A40": 149.7e12,
        "NVIDIA RTX A6000": 154.8e12,
        "NVIDIA RTX A4000": None,
        "NVIDIA GeForce RTX 4090": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA Unheard-of": None,
    }
    for name, peak in in_half_precision.items():
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
        warned = name == "NVIDIA Unheard-of"
        with pytest.warns(UserWarning, match="FLOPs not found") if warned else contextlib.nullcontext():
            assert known_peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    assert known_peak_flops(torch.device("cuda"), torch.float32) is None
