"""Tests that need a CUDA device; and where there is none, the CPU in its place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = pytest.param("cuda", marks=NEEDS_CUDA)  # beside "cpu"


def accelerator(device: str) -> str:
    """What Lightning calls a device."""
    return "gpu" if device == "cuda" else device


def take_cpu_for_cuda(monkeypatch: pytest.MonkeyPatch, peak: Callable[[], int] = lambda: 1) -> None:
    """Have `find_batch_size` take the CPU for a CUDA device with 64 GiB, and `peak` for what a step holds at most."""
    monkeypatch.setattr("lightning_sft.planning.batch_sizes._DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak())


def attend_as_the_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """Attention within documents as CUDA's kernel has it: in one piece, without asking the device where they end."""
    positions = torch.arange(query.shape[2], device=query.device)
    document = torch.bucketize(positions, bounds, right=True)
    mask = (document[:, None] == document) & (positions[:, None] >= positions)
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2)
