"""Where the time of one optimizer step goes: the operators of a training step, by kind.

    python tests/benchmarks/profile_step.py --data ../shared/data/gsm8k/train.jsonl --case small-fp32

One step after the warm-up of the `ours` contestant of train.py is run under torch's profiler. An operator's time is its
own, without that of operators it calls; what no operator accounts for is Python's. The rate of the matrix products is
set beside that of large products, which is measured in the same process.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import train
from measure import machine, matmul_rate, table
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "addmm_", "_addmm_activation"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "optimizer and clipping": ("_fused_adam", "_foreach_norm", "linalg_vector_norm", "_foreach_mul_"),
    "exponentials, sums and maxima": ("exp", "exp_", "sum", "amax", "logsumexp", "softmax", "_softmax", "mean"),
    "element by element": (
        "mul",
        "mul_",
        "add",
        "add_",
        "sub",
        "sub_",
        "div",
        "neg",
        "silu",
        "pow",
        "rsqrt",
        "addcmul",
    ),
    "copies, zeros and lookups": ("copy_", "cat", "zero_", "fill_", "index", "embedding", "gather", "clone", "scatter"),
}


class Profiled(L.Callback):
    """Profiles the step after the warm-up."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], with_flops=True)
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == train.WARMUP_STEPS:
            self._profile.start()
            self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == train.WARMUP_STEPS:
            self.seconds = time.perf_counter() - self._begun
            self._profile.stop()

    def events(self) -> list[Any]:
        return list(self._profile.key_averages())


def kind_of(operator: str) -> str:
    """The first kind that names the operator, or its beginning where that begins with an underscore."""
    name = operator.removeprefix("aten::")
    for kind, names in KINDS.items():
        if name in names or any(name.startswith(each) for each in names if each.startswith("_")):
            return kind
    for kind, names in KINDS.items():  # backward formulas: `silu_backward`, `embedding_dense_backward`
        if any(name.startswith(f"{each}_") for each in names):
            return kind
    return "other operators"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--case", choices=train.CASES, default="small-fp32")
    parser.add_argument("--operators", type=int, default=0, help="also show so many operators that take longest")
    options = parser.parse_args()
    print(machine("cpu"), f"{torch.get_num_threads()} threads")
    dtype = train.CASES[options.case]["dtype"]
    rate = matmul_rate(dtype)["rate"]
    profiled, num_steps = Profiled(), train.WARMUP_STEPS + 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "case").mkdir()
        train.prepare(options.case, options.data, folder, num_steps)
        os.chdir(temporary)
        train.ours(folder / "case", options.case, "cpu", num_steps, callbacks=[profiled])
    seconds: dict[str, float] = defaultdict(float)
    flops = 0.0
    events = profiled.events()
    for event in events:
        if event.key.startswith("aten::"):
            seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
            flops += event.flops if kind_of(event.key) == "matrix products" else 0
    seconds["Python and torch's autograd between them"] = profiled.seconds - sum(seconds.values())
    lines = [[kind, f"{spent:.3f}", f"{spent / profiled.seconds:.1%}"] for kind, spent in seconds.items()]
    lines.sort(key=lambda line: -float(line[1]))
    print(f"\n{options.case}: one step, {profiled.seconds:.2f} s\n")
    print(table(["", "seconds", "share"], lines))
    reached = flops / seconds["matrix products"]
    print(f"\nMatrix products: {reached / 1e9:,.0f} GFLOP/s, {reached / rate:.0%} of large ones' {rate / 1e9:,.0f}.")
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[: options.operators]:
        share = event.self_cpu_time_total / 1e6 / profiled.seconds
        print(f"{event.key}: {share:.1%}, {event.count} times ({kind_of(event.key)})")


if __name__ == "__main__":
    main()
