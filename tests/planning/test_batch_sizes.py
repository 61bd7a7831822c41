"""Sizes of microbatches are tried until memory runs out."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cuda import take_cpu_for_cuda
from support.models import character_tokenizer, tiny_config
from support.runs import ROWS, adamw
from support.trials import QUIET, module, rows

from lightning_sft import SFTDataModule, SFTModule, find_batch_size
from lightning_sft.planning.batch_sizes import largest_size


@given(st.integers(1, 600), st.integers(0, 10**6), st.integers(0, 10**6))
def test_trying_comes_within_five_per_cent(start, more, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    end = start + more
    found = largest_size(fits, start, end)
    assert len(set(tried)) == len(tried)
    assert found == 0 if limit < start else found in tried
    assert found <= limit
    assert limit < start or found == end or limit < found + max(1, 0.05 * found) + 1
    assert all(start <= size <= end for size in tried)


class Watched(SFTModule):
    """Takes `per_token` bytes for each token of a microbatch, and no more than `limit` tokens."""

    per_token, limit = 2**20, 10**9

    def training_step(self, batch, batch_idx):
        (self.size,) = {microbatch.response_mask.numel() for microbatch in batch.microbatches}
        assert len(batch.microbatches) == 2
        assert all(microbatch.response_mask.all() for microbatch in batch.microbatches)
        if self.size > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().training_step(batch, batch_idx)

    def peak(self):
        return self.size * self.per_token


@pytest.fixture
def watched(monkeypatch):
    found = Watched(tiny_config(), optimizer=adamw)
    take_cpu_for_cuda(monkeypatch, peak=found.peak)
    return found


@pytest.mark.parametrize(
    ("of", "layout", "limit"),
    [("the device", "packed", 400), ("`memory_gib`", "padded", 300), ("`memory_gib`", "packed", 44)],
)
def test_sizes_are_tried_until_memory_runs_out(watched, of, layout, limit):
    options = {}
    if of == "the device":
        watched.limit = limit
    else:
        options["memory_gib"] = limit / 1024
    found = find_batch_size(watched, rows(layout=layout), margin=0.1, **options, **QUIET)
    lengths = sorted((len(row["prompt"]) + len(row["output"]) for row in ROWS), reverse=True)  # and EOS, less one
    assert found.longest == lengths[0] == 44
    assert limit / 1.05 - 1 < found.most_tokens <= limit
    assert found.max_tokens_per_microbatch == max(int(0.9 * found.most_tokens), 44)
    costs = [sum(lengths[:n]) if layout == "packed" else n * 44 for n in range(1, len(lengths))]
    assert found.batch_size == sum(cost <= found.max_tokens_per_microbatch for cost in costs)
    tried = dict(found.tried)
    assert max(tried) > limit
    for size, peak in tried.items():  # padded rows of equal lengths may take a few tokens more
        assert peak is None or peak == pytest.approx(size * 2**20, rel=0.03)
        assert size <= limit or of != "the device" or peak is None
    assert f"--data.max_tokens_per_microbatch {found.max_tokens_per_microbatch}" in str(found).splitlines()
    assert f"Up to {found.batch_size} rows" in str(found)
    assert f"{found.most_tokens} tokens at most fit into" in str(found)


def test_sizes_beyond_all_rows_are_not_tried_and_not_said_to_fit_no_more(watched):
    found = find_batch_size(watched, rows(), memory_gib=64, **QUIET)
    lengths = [len(row["prompt"]) + len(row["output"]) for row in ROWS]
    assert found.most_tokens == max(size for size, _ in found.tried) == sum(lengths)
    said = f"All {sum(lengths):,} tokens of the rows that were read fit into 64.00 GiB; larger sizes were not tried."
    assert said in str(found)


def test_memory_that_runs_out_on_the_longest_row_is_said(watched):
    for options in ({"memory_gib": 0.001}, {}):
        with pytest.raises(ValueError, match="GiB of memory, too little for one row of 44 tokens, the longest"):
            find_batch_size(watched, rows(), **options, **QUIET)
        watched.limit = 0


def test_sizes_are_found_for_streamed_rows_of_which_longer_ones_may_follow(watched, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = SFTDataModule(character_tokenizer(), str(path), streaming=True, max_length=64, batch_size=8)
    found = find_batch_size(watched, data, **QUIET)
    assert found.longest == 63
    assert "All of the data" not in str(found)


def test_main_memory_is_not_tried_since_running_out_of_it_would_end_the_program():
    with pytest.raises(ValueError, match=r"`accelerator` is cpu, .* only tried on a CUDA device.* `lightning-sft est"):
        find_batch_size(module(), rows(), **QUIET)
