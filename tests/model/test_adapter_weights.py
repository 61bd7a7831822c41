"""The plain model that is made of a model with adapters."""

import pytest
import torch
from support.lora import LORA, build, disturb, logits

from lightning_sft.model.adapter_weights import plain_weights
from lightning_sft.model.lora import add_lora


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["model.embed_tokens"]}], ids=str)
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_plain_model_of_adapters_computes_the_same(name, settings):
    model, plain = build(name), build(name)
    add_lora(model, LORA | settings)
    before = {key: weight.clone() for key, weight in disturb(model).state_dict().items()}
    expected = logits(model)
    plain.load_state_dict(plain_weights(model))
    plain.tie_weights()
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_merging_rounds_once():
    model = build("untied", torch.bfloat16)
    add_lora(model, LORA)
    layer = disturb(model).model.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    exact = layer.base_layer.weight.double() + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = plain_weights(model)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(merged, exact.float().bfloat16())
