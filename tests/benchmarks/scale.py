"""Whether memory and time stay flat: over a long run, over many rows, and in the plan of very many.

    python tests/benchmarks/scale.py --steps 2000 --rows 1000000 --plan 10000000

Each measurement has a process of its own. `VmRSS` is all resident memory; `RssAnon` leaves out pages of files, such as
memory-mapped rows, which the system takes back when it wants to. Peaks of stages are sampled every 20 ms.
"""

import argparse
import gc
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lightning as L
import numpy as np
import torch
from measure import in_turn, machine, table

MIB = 2**20
MODEL = {
    "model_type": "qwen2",
    "vocab_size": 83,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
BATCH_SIZE, NUM_VALIDATION_ROWS, FEW_ROWS, WARMUP_STEPS = 32, 256, 10_000, 200
Numbers = dict[str, float]


def resident(field: str, process: int | str = "self") -> float:
    """MiB of `VmRSS` or `RssAnon`."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 / MIB if found else 0.0


def workers() -> list[str]:
    """The processes that this one has started, whichever of its threads did."""
    return " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()


class Stages:
    """Seconds and peaks of each named stage."""

    def __init__(self) -> None:
        self.numbers: Numbers = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        gc.collect()
        peaks, done = {"VmRSS": 0.0, "RssAnon": 0.0, "worker RssAnon": 0.0}, threading.Event()
        watch = threading.Thread(target=self._watch, args=(peaks, done))
        start = time.perf_counter()
        watch.start()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            done.set()
            watch.join()
        self.numbers |= {f"{name}, seconds": seconds} | {f"{name}, {key}": peak for key, peak in peaks.items()}

    @staticmethod
    def _watch(peaks: Numbers, done: threading.Event) -> None:
        while True:
            ended = done.wait(0.02)
            for field in ("VmRSS", "RssAnon"):
                peaks[field] = max(peaks[field], resident(field))
            for process in workers():
                with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                    peaks["worker RssAnon"] = max(peaks["worker RssAnon"], resident("RssAnon", process))
            if ended:
                return


# -- a long run ----------------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Resident memory every 100 optimizer steps, after garbage collection; the time at which each step begins."""

    def __init__(self) -> None:
        self.memory: dict[int, tuple[float, float]] = {}
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 100 == 0:
            gc.collect()
            self.memory[trainer.global_step] = resident("VmRSS"), resident("RssAnon")


def long_run(folder: Path, num_steps: int) -> Numbers:
    """Training with all that the command line adds: generations every 100 steps, validation and checkpoints."""
    from lightning_sft.examples import word_problems

    watch = Watch()
    datamodule, module = _datamodule(folder, train_data=word_problems(20_000), val_data=word_problems(64, 1)), _module()
    _trainer(folder, num_steps, [watch], val_check_interval=500).fit(module, datamodule)

    steps = [step for step in watch.memory if step >= WARMUP_STEPS]
    numbers: Numbers = {}
    for index, field in enumerate(("VmRSS", "RssAnon")):
        for step in steps:
            numbers[f"{field} at {step}"] = watch.memory[step][index]
        values = [watch.memory[step][index] for step in steps]
        numbers[f"{field} per 1,000 steps"] = 1000 * float(np.polyfit(steps, values, 1)[0])
    took = np.diff(watch.times)
    third = (num_steps - WARMUP_STEPS) // 3  # medians: the steps after which something is generated do not count
    numbers["early seconds"] = float(np.median(took[WARMUP_STEPS : WARMUP_STEPS + third]))
    numbers["late seconds"] = float(np.median(took[-third:]))
    return numbers


def _datamodule(folder: Path, **options: Any) -> Any:
    import datasets

    from lightning_sft.data.datamodule import SFTDataModule
    from lightning_sft.examples import word_tokenizer

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return SFTDataModule(word_tokenizer(), batch_size=BATCH_SIZE, **options)


def _module() -> Any:
    from lightning_sft.training.module import SFTModule

    torch.set_num_threads(1)
    return SFTModule(MODEL, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))


def _trainer(folder: Path, num_steps: int, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_sft.callbacks import GenerationMonitor, LastCheckpoint, StepProgressBar, TokenThroughput
    from lightning_sft.generation.sampling import Sampling

    monitor = GenerationMonitor(every_n_steps=100, num_prompts=32, sampling=Sampling(max_new_tokens=20))
    return L.Trainer(
        accelerator="cpu",
        max_steps=num_steps,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        logger=TensorBoardLogger(folder / "runs", default_hp_metric=False),
        callbacks=[TokenThroughput(), monitor, LastCheckpoint(), StepProgressBar(), *callbacks],
        **options,
    )


# -- many rows -----------------------------------------------------------------------------------------------------


def write_rows(path: Path, num_rows: int, at_a_time: int = 10_000) -> None:
    """Word problems, one JSON object a line; every hundredth is several times as long as the others."""
    from lightning_sft.examples import word_problems

    with open(path, "w") as file:
        for seed, start in enumerate(range(0, num_rows, at_a_time)):
            for index, row in enumerate(word_problems(min(at_a_time, num_rows - start), seed)):
                copies = 1 if index % 100 else 4
                file.write(json.dumps({**row, "prompt": row["prompt"] * copies}) + "\n")


def many_rows(folder: Path, num_rows: int) -> Numbers:
    """Everything that happens to rows, as `fit` does it, but in stages.

    One row in a hundred is too long, and dropped; the validation rows are split off, so that every row is found
    through a selection.
    """
    from lightning_sft.data.rows.sources import open_sources

    path = folder / f"{num_rows}.jsonl"
    folder = folder / f"{num_rows}"
    stages, module = Stages(), _module()
    with stages("100 rows"):  # imports, and what libraries set up once
        _datamodule(folder, train_data=[{"prompt": "a", "output": "b"}] * 100).setup("fit")
    options = {"max_length": 100, "too_long": "drop", "val_fraction": NUM_VALIDATION_ROWS / num_rows}
    datamodule = _datamodule(folder, train_data=str(path), **options)
    with stages("read the file"):
        open_sources(str(path), "train_data")
    with stages("tokenise, drop, split"):
        datamodule.prepare_data()
    with stages("plan"):
        datamodule.setup("fit")
    loader = iter(datamodule.train_dataloader())
    with stages("shuffle, load 1 step"):
        next(loader)
    with stages("load 200 steps"):
        for _ in range(200):
            next(loader)
    with stages("train 50 steps"):
        _trainer(folder, 50, [], val_check_interval=25).fit(module, datamodule)
    return stages.numbers


# -- the plan of very many -------------------------------------------------------------------------------------------


def long_plan(num_rows: int, **_: Any) -> Numbers:
    """Plan an epoch's first step, one in its middle, and the next epoch's first."""
    from lightning_sft.data.steps.plan import BatchPlan, StepRule

    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 2000, num_rows, dtype=np.int32)
    num_response_tokens = lengths // 2
    BatchPlan([1], [1], StepRule(BATCH_SIZE)).step(0)
    stages, before = Stages(), resident("RssAnon")
    with stages("construct"):
        plan = BatchPlan(
            lengths, num_response_tokens, StepRule(BATCH_SIZE, max_tokens_per_microbatch=4096), world_size=8
        )
    for name, index in {
        "first step": 0,
        "a step in the middle": plan.steps_per_epoch // 2,
        "first step of the next epoch": plan.steps_per_epoch,
    }.items():
        with stages(name):
            plan.step(index)
    numbers = stages.numbers
    gc.collect()
    numbers["bytes a row"] = (resident("RssAnon") - before) * MIB / num_rows
    numbers["peak"] = max(numbers[name] for name in numbers if name.endswith(", RssAnon")) - before
    return numbers


# -- report --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of the long run; 0: skip it")
    parser.add_argument("--rows", type=int, default=1_000_000, help=f"compared with {FEW_ROWS:,}; 0: skip it")
    parser.add_argument("--plan", type=int, default=10_000_000, help="rows planned; 0: skip it")
    options = parser.parse_args()
    print(machine("cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.steps:
            report_steps(options.steps, measured(partial(long_run, num_steps=options.steps), folder))
        if options.rows:
            results = []
            for num_rows in (FEW_ROWS, options.rows):
                write_rows(folder / f"{num_rows}.jsonl", num_rows)
                results.append(measured(partial(many_rows, num_rows=num_rows), folder))
            report_rows(options.rows, *results)
        if options.plan:
            report_plan(options.plan, measured(partial(long_plan, num_rows=options.plan), folder))


def measured(measurement: Any, folder: Path) -> Numbers:
    """The numbers of one measurement, made in a process of its own."""
    _, results = in_turn({"": measurement}, {"folder": folder}, rounds=1, dtype="float32")
    if "error" in results[""]:
        raise RuntimeError(results[""]["error"])
    return results[""]


def report_steps(num_steps: int, numbers: Numbers) -> None:
    at = sorted({WARMUP_STEPS, num_steps // 2, num_steps})
    header = ["", *(f"at step {step:,}" for step in at), "growth per 1,000 steps"]
    lines = [
        [
            f"{field}, MiB",
            *(f"{numbers[f'{field} at {step}']:,.1f}" for step in at),
            f"{numbers[f'{field} per 1,000 steps']:+.2f}",
        ]
        for field in ("VmRSS", "RssAnon")
    ]
    print(f"\n{num_steps:,} optimizer steps, generations every 100\n\n{table(header, lines)}")
    early, late = numbers["early seconds"] * 1000, numbers["late seconds"] * 1000
    print(f"\nA step takes {early:.1f} ms early and {late:.1f} ms late in the run.", flush=True)


def report_rows(num_rows: int, few: Numbers, many: Numbers) -> None:
    keys = {
        "seconds": "seconds",
        "RssAnon": "RssAnon, MiB",
        "worker RssAnon": "largest worker's",
        "VmRSS": "VmRSS, MiB",
    }
    header = ["peaks", *(title for title in keys.values() for _ in range(2))]
    lines = [["rows", *[f"{FEW_ROWS:,}", f"{num_rows:,}"] * len(keys)]]
    for name in [name.removesuffix(", seconds") for name in many if name.endswith(", seconds")]:
        values = [numbers[f"{name}, {key}"] for key in keys for numbers in (few, many)]
        lines.append([name, *(f"{value:.2f}" for value in values[:2]), *(f"{value:,.0f}" for value in values[2:])])
    print(f"\n{num_rows:,} rows, each stage\n\n{table(header, lines)}", flush=True)


def report_plan(num_rows: int, numbers: Numbers) -> None:
    lines = [[name.removesuffix(", seconds"), f"{numbers[name]:.3f}"] for name in numbers if name.endswith(", seconds")]
    print(f"\nThe plan of {num_rows:,} rows\n\n{table(['', 'seconds'], lines)}")
    print(f"\nIt keeps {numbers['bytes a row']:.0f} bytes a row, and takes {numbers['peak']:,.0f} MiB at its peak.")


if __name__ == "__main__":
    main()
