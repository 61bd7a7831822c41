"""Streamed rows made into optimizer steps by 1, 2 and 4 processes: together, and each for itself.

    python tests/benchmarks/streaming.py --data ../shared/data/gsm8k/train.jsonl --tokenizer path/to/qwen2/tokenizer

The rows are GSM8K's under the `r1_zero` prompt. Processes that train together tokenise a share of them each and
exchange the tokens; without a process group each tokenises all of them. Processor time is that of a process with one
thread for its tokenizer: what each would take with a core of its own, but for what they lose by sharing caches.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measure import machine, table
from tokenization import prompt_template

_WARM_UP = 2  # steps, of which the first reads a block of rows


def load(rank: int, world_size: int, together: bool, options: argparse.Namespace, folder: str) -> None:
    """Make steps as one of several processes, and write down what they took."""
    from lightning_sft import SFTDataModule
    from lightning_sft.data.steps.step_loader import LoaderOptions
    from lightning_sft.examples import r1_zero_row

    if together:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    settings: dict[str, Any] = {"row_transform": r1_zero_row, "prompt_template": prompt_template()}
    settings |= {"streaming": True, "batch_size": options.batch_size}
    rows = SFTDataModule(options.tokenizer, str(options.data), **settings)
    how = LoaderOptions(rows.tokenizer, "packed", rank, world_size)
    steps = iter(rows.training_rows.loader(None, range(_WARM_UP + options.steps), how))
    for _ in range(_WARM_UP):
        next(steps)
    before = time.process_time()
    num_tokens = sum(step.totals.num_tokens for step in steps)
    Path(folder, f"{rank}").write_text(f"{time.process_time() - before} {num_tokens}")
    if together:
        dist.destroy_process_group()


def measure(world_size: int, together: bool, options: argparse.Namespace) -> tuple[float, int]:
    """Processor seconds of a process, the mean over all of them, and the tokens of all steps."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(load, (world_size, together, options, folder), nprocs=world_size)
        found = [Path(folder, f"{rank}").read_text().split() for rank in range(world_size)]
    return statistics.mean(float(seconds) for seconds, _ in found), int(found[0][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K as JSON lines of `question` and `answer`")
    parser.add_argument("--tokenizer", required=True, help="a name or a folder")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cases = [(size, together) for size in options.processes for together in ([True, False] if size > 1 else [False])]
    found = {case: [measure(*case, options) for _ in range(options.rounds)] for case in cases}
    print(
        f"{machine('cpu')}\n\n{options.steps} steps of {options.batch_size} rows, medians of {options.rounds} rounds\n"
    )
    lines = []
    for (size, together), runs in found.items():
        seconds, num_tokens = statistics.median(run[0] for run in runs), runs[0][1]
        how = "together" if together else "each for itself" if size > 1 else "alone"
        numbers = [f"{seconds:.2f} s", f"{seconds * size:.2f} s", f"{num_tokens / seconds:,.0f}"]
        lines.append([f"{size}, {how}", *numbers])
    print(table(["processes", "of a process", "of all", "tokens/s with a core for each"], lines))


if __name__ == "__main__":
    main()
