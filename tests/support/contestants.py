"""Contestants of a benchmark, in a module of little else: each is imported by a process of its own."""

import measure
import torch


def fails(**_: object) -> None:
    raise RuntimeError("on purpose\nand more")


def counts_and_allocates_64_mebibytes(number: int, **_: object) -> dict[str, int]:
    """In a process of its own, as benchmarks measure: here another test's memory may be freed in between."""
    peak = measure.PeakMemory("cpu")
    torch.ones(2**24)
    return {"number": number, "twice": 2 * number, "peak": peak.read()}
