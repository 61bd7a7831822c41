"""Sizes are tried on a GPU whose memory really runs out."""

import pytest
import torch
from support.cuda import NEEDS_CUDA
from support.models import character_tokenizer, tiny_config

from lightning_sft import SFTDataModule, SFTModule, find_batch_size

pytestmark = NEEDS_CUDA


@pytest.fixture
def _little_memory():
    """A quarter of a GiB more than this process holds now."""
    torch.cuda.empty_cache()
    torch.cuda.init()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("_little_memory")
def test_memory_that_runs_out_ends_the_doubling_and_is_free_again():
    rows = [{"prompt": "p", "output": "o" * 57} for _ in range(1000)]
    module = SFTModule(tiny_config(hidden_size=256, intermediate_size=1024))
    held = torch.cuda.memory_allocated()
    options = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "enable_progress_bar": False}
    found = find_batch_size(module, SFTDataModule(character_tokenizer(), rows, batch_size=8), **options)
    fitting = [size for size, peak in found.tried if peak is not None]
    too_large = [size for size, peak in found.tried if peak is None]
    assert found.most_tokens == max(fitting)
    assert min(too_large) <= 1.05 * max(fitting) + 1
    assert len(too_large) > 1 or len(fitting) > 3
    assert torch.cuda.memory_allocated() < held + 2**27  # which workspaces of cuBLAS take at the most
