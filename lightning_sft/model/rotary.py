"""Rotary position frequencies, which need float32 whatever the weights are converted to."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def rotary_frequencies_kept(module: nn.Module) -> Iterator[None]:
    """Within this context all tensors may be converted or moved: afterwards rotary frequencies are float32 again.

    In bfloat16 they would be wrong by up to 0.5 in the cosine at position 4,000 (Lightning's `bf16-true` casts them).

    Args:
        module: The module whose tensors are converted.
    """
    exact = [
        (each, name, buffer)
        for each in module.modules()
        for name, buffer in each.named_buffers(recurse=False)
        if name.endswith("inv_freq") and buffer.dtype == torch.float32 and not buffer.is_meta
    ]
    yield
    for each, name, buffer in exact:
        converted = getattr(each, name)
        if converted.dtype != torch.float32:
            setattr(each, name, buffer.to(converted.device))
