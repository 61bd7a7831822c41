"""Multiplications and additions of training, counted by hand."""

import pytest
from support.architectures import tiny_architecture
from support.models import tiny_model

from lightning_sft.model.flops import training_flops


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_cost_nothing_unless_they_are_the_head_and_frozen_weights_need_no_gradient(tied):
    model = tiny_model(tie_word_embeddings=tied)
    totals = {"num_tokens": 10, "num_response_tokens": 4, "num_attended": 30}
    body, head = 2 * (4 * 16 * 16 + 3 * 16 * 32), 131 * 16
    assert training_flops(model, **totals) == 6 * body * 10 + 6 * head * 4 + 12 * 2 * 16 * 30
    model.requires_grad_(False)
    assert training_flops(model, **totals) == 4 * body * 10 + 4 * head * 4 + 12 * 2 * 16 * 30


@pytest.mark.parametrize("model_type", ["mamba", "aria_text"])
def test_what_states_and_experts_take_is_not_known(model_type):
    assert training_flops(tiny_architecture(model_type), 10, 4, 30) is None
