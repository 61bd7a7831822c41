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

    def __init__(self, contest: train.Contest) -> None:
        self._step, self.on_cuda = contest.warmup_steps, contest.device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
        self._profile = profile(activities=activities, with_flops=True)
        self.seconds = 0.0

    def _wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self._step:
            self._wait()
            self._profile.start()
            self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self._step:
            self._wait()
            self.seconds = time.perf_counter() - self._begun
            self._profile.stop()

    def events(self) -> list[Any]:
        """The operators; of a CUDA device the kernels, each with what launched it."""
        return list(self._profile.key_averages())

    def save(self, trace: Path) -> None:
        self._profile.export_chrome_trace(str(trace))

    def own_seconds(self, event: Any) -> float:
        """Of the device, without the operators that it calls."""
        return (event.self_device_time_total if self.on_cuda else event.self_cpu_time_total) / 1e6


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


def counts(event: Any) -> bool:
    """Whether its own time is to be counted: on CUDA that of each kernel is also given to the operator around it."""
    is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
    return bool(event.key.startswith("triton_") if is_kernel else event.key.startswith("aten::"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--case", choices=train.CASES, default="small-fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--warmup", type=int, default=train.WARMUP_STEPS, help="optimizer steps before the profiled one"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of an optimizer step")
    parser.add_argument("--compile", action="store_true", help="profile compiled blocks")
    parser.add_argument("--operators", type=int, default=0, help="also show so many operators that take longest")
    parser.add_argument("--trace", type=Path, help="file for a trace that chrome://tracing and Perfetto open")
    options = parser.parse_args()
    device = options.device
    print(machine(device), f"{torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        contest = train.Contest(
            Path(temporary) / "case",
            options.case,
            device,
            options.warmup + 1,
            options.batch_size,
            warmup_steps=options.warmup,
        )
        train.prepare(contest, options.data.resolve())
        rate = matmul_rate("float32" if contest.precision == "32-true" else "bfloat16", device)["rate"]
        os.chdir(temporary)
        profiled = Profiled(contest)
        train.ours(contest, callbacks=[profiled], compile=options.compile)
    if options.trace:
        profiled.save(options.trace)
    report(profiled, options.case, rate, options.operators)


def report(profiled: Profiled, case: str, rate: float, num_operators: int) -> None:
    """Print the table, and the operators that take longest."""
    seconds: dict[str, float] = defaultdict(float)
    flops = 0.0
    events = profiled.events()
    for event in events:
        if counts(event):
            seconds[kind_of(event.key)] += profiled.own_seconds(event)
        flops += event.flops if kind_of(event.key) == "matrix products" else 0
    rest = "the device waits" if profiled.on_cuda else "Python and torch's autograd between them"
    seconds[rest] = profiled.seconds - sum(seconds.values())
    lines = [[kind, f"{spent:.3f}", f"{spent / profiled.seconds:.1%}"] for kind, spent in seconds.items()]
    lines.sort(key=lambda line: -float(line[1]))
    print(f"\n{case}: one step, {profiled.seconds:.3f} s\n")
    print(table(["", "seconds", "share"], lines))
    reached = flops / seconds["matrix products"]
    print(f"\nMatrix products: {reached / 1e9:,.0f} GFLOP/s, {reached / rate:.0%} of large ones' {rate / 1e9:,.0f}.")
    for event in sorted(events, key=lambda event: -profiled.own_seconds(event))[:num_operators]:
        share = profiled.own_seconds(event) / profiled.seconds
        print(f"{event.key[:150]}: {share:.1%}, {event.count} times ({kind_of(event.key)})")


if __name__ == "__main__":
    main()
