"""A step on its way to a device: moved, pinned and copied by Lightning and torch."""

import pickle

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from support.models import character_tokenizer
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.plan import StepTotals
from lightning_sft.data.stream.stream_order import StreamPosition
from lightning_sft.data.stream.streamed_steps import Bookmark, StreamedStep
from lightning_sft.data.tokens.collation import collate
from lightning_sft.data.tokens.example import Example

LAYOUTS = ["padded", "packed"]


def step_of(layout):
    examples = [Example([97, 98, 99], 1, location="row 1"), Example([97, 99], 1, location="row 2")]
    return OptimizerStep([collate(examples, layout)], StepTotals(2, 3, 3, 4), character_tokenizer())


def tensors_of(step):
    (microbatch,) = step.microbatches
    packing = microbatch.packing
    packed = [] if packing is None else [packing.position_ids, packing.cu_seq_lens]
    return [microbatch.input_ids, microbatch.labels, microbatch.response_mask, microbatch.response_positions, *packed]


def assert_same_but_for_tensors(step, other):
    assert step.locations == other.locations
    assert step.totals == other.totals
    assert [each.max_length for each in step.microbatches] == [each.max_length for each in other.microbatches]
    assert step.tokenizer is other.tokenizer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lightning_moves_all_tensors_of_a_step_to_a_device(layout):
    step = step_of(layout)
    moved = move_data_to_device(step, torch.device("meta"))
    assert all(tensor.is_meta for tensor in tensors_of(moved))
    assert not any(tensor.is_meta for tensor in tensors_of(step))
    assert_same_but_for_tensors(moved, step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_pins_all_tensors_of_a_step(layout, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    step = step_of(layout)
    streamed = StreamedStep(step, Bookmark(1, StreamPosition(), "hash"))
    for found in (pin_memory(step), pin_memory(streamed).step):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(found), tensors_of(step), strict=True))
        assert not {id(tensor) for tensor in tensors_of(found)} & {id(tensor) for tensor in tensors_of(step)}
        assert_same_but_for_tensors(found, step)
    assert sorted(map(id, pinned)) == sorted(2 * [id(tensor) for tensor in tensors_of(step)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_have_no_tokenizer(layout):
    step = step_of(layout)
    copied = pickle.loads(pickle.dumps(step))
    assert copied.tokenizer is None
    assert copied.locations == step.locations
    assert copied.totals == step.totals
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(copied), tensors_of(step), strict=True))


def test_a_step_without_a_tokenizer_shows_ids():
    assert "> 97</span>" in pickle.loads(pickle.dumps(step_of("padded")))._repr_html_()
    assert ">a</span>" in step_of("padded")._repr_html_()
