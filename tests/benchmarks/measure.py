"""How benchmarks measure: each contestant in a process of its own, in turn, several rounds, medians."""

import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
SHAPES = ((4096, 384, 1024), (4096, 1024, 384), (2048, 1024, 4096))  # rows, inner dimension, columns
_GEMM = "GEMM"
_TAKE_LONG_TO_IMPORT = [
    "lightning",
    "datasets",
    "lightning_sft.cli.main",
    "torch._inductor.compile_fx",
    "transformers.models.qwen2.modeling_qwen2",
    "trl.trainer.sft_trainer",
]


class PeakMemory:
    """Bytes above those at the start: of the CUDA device, or of this process on CPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._start = _status("VmRSS")

    def read(self) -> int:
        """The peak so far, above the start."""
        return (torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")) - self._start


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """Wall-clock time of one call, the device's work included."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def _gemm(dtype: str, device: str, shapes: Sequence[tuple[int, int, int]] = SHAPES, **_: Any) -> dict[str, float]:
    """A contestant like others."""
    return matmul_rate(dtype, device, shapes)


def matmul_rate(dtype: str, device: str = "cpu", shapes: Sequence[tuple[int, int, int]] = SHAPES) -> dict[str, float]:
    """FLOP/s of large matrix products: the median of several, of shapes that models have."""
    rates, kind = [], {"dtype": getattr(torch, dtype), "device": device}
    for rows, inner, columns in shapes:
        scale = 8 if device == "cuda" else 1
        a = torch.randn(rows * scale, inner * scale, **kind)
        b = torch.randn(inner * scale, columns * scale, **kind)
        a @ b
        rates += [2 * a.numel() * b.shape[1] / seconds(lambda a=a, b=b: a @ b, device) for _ in range(7)]
    return {"rate": statistics.median(rates)}


def peak_rate(dtype: torch.dtype, device: str) -> float | None:
    """FLOP/s that the device's maker states, without sparsity; None on CPU."""
    from lightning_sft.callbacks.throughput import known_peak_flops

    return known_peak_flops(torch.device("cuda"), dtype) if device == "cuda" else None


def in_turn(
    contestants: Mapping[str, Callable[..., dict[str, float]]],
    arguments: dict[str, Any],
    rounds: int,
    dtype: str,
    device: str = "cpu",
) -> tuple[float, dict[str, dict[str, Any]]]:
    """Run every contestant once in each round, each time in a fresh process.

    Returns:
        The rate of matrix products, measured in each round too, and the numbers of each contestant; all medians. A
        contestant that fails has its error as the only entry.
    """
    contestants = {_GEMM: partial(_gemm, dtype=dtype, device=device), **contestants}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    if device == "cuda":  # which no forked process can use if an import has asked for it, as that of bitsandbytes does
        context: Any = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_TAKE_LONG_TO_IMPORT)
    for _ in range(rounds):
        for name, contestant in contestants.items():
            if results[name] and "error" in results[name][0]:
                continue
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(sender, contestant, arguments))
            process.start()
            sender.close()
            try:
                results[name].append(receiver.recv())
            except EOFError:
                results[name].append({"error": "the process died (out of memory?)"})
            process.join()
            print(f"{name}: {results[name][-1]}", file=sys.stderr, flush=True)
    medians = {name: _median(runs) for name, runs in results.items()}
    return medians.pop(_GEMM)["rate"], medians


def _report(sender: Any, contestant: Callable[..., dict[str, float]], arguments: dict[str, Any]) -> None:
    sys.stdout = sys.stderr  # the table alone goes to stdout
    try:
        sender.send(contestant(**arguments))
    except Exception as error:  # a contestant that cannot run is a result too
        sender.send({"error": f"{type(error).__name__}: {error}".splitlines()[0][:100]})


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    if "error" in runs[-1]:
        return runs[-1]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device: str) -> str:
    """What the numbers were measured on."""
    packages = ["torch", "transformers", "lightning", "trl"]
    versions = [f"{package} {found}" for package in packages if (found := _version(package))]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores, {_cpu()}"
    return f"{name}; Python {platform.python_version()}, {', '.join(versions)}"


def _cpu() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
