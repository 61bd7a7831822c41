"""Adapters beside frozen weights: what they compute, and which settings are refused."""

import sys
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.lora import LORA, MODELS, build, disturb, logits
from transformers import AutoModelForCausalLM

from lightning_sft import SettingsError, SFTModule, export_model
from lightning_sft.model.lora import add_lora
from lightning_sft.model.packing import enable_packing


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_layer_is_the_layer_and_a_product_of_low_rank(name):
    plain, model = build(name), build(name)
    add_lora(model, LORA)
    assert torch.equal(logits(model), logits(plain))
    assert not any(weight.requires_grad for key, weight in model.named_parameters() if "lora_" not in key)
    disturb(model)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key, weight in plain.named_parameters():
            stem = key.removesuffix(".weight")
            if f"{stem}.lora_A.default.weight" in weights:
                delta = weights[f"{stem}.lora_B.default.weight"] @ weights[f"{stem}.lora_A.default.weight"]
                weight += 2 * (delta.T if name == "gpt2" else delta)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(plain), logits(build(name)), atol=0.01)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "`lora` has `rank`, which cannot be set. These can: `r`, `lora_alpha`"),
        ({"r": 4, "trainable_token_indices": [1]}, "which would train, but could not be merged into the model"),
        ({"r": 4, "inference_mode": True}, "`lora` has `inference_mode`, which cannot be set"),
        (
            {"r": 4, "target_modules": ["o_proj"], "lora_bias": True},
            "lora_bias` is true, but `model.layers.0.self_attn.o",
        ),
        ({"r": 0}, "`lora.r` is 0, expected at least 1"),
        ({"r": 4, "target_modules": ["query"]}, "does not fit Qwen2ForCausalLM.*Its linear layers are down_proj"),
        ({"r": 4, "target_modules": ["lm_head"]}, "share their weights. Leave both out of `target_modules`"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        SFTModule(build("tied"), lora=lora).configure_model()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_a_model_with_adapters_is_not_saved_by_names_that_nobody_can_load(tmp_path):
    wrapped = get_peft_model(build("untied"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    module = SFTModule(wrapped)
    module.configure_model()
    expected = logits(module.model)
    for model in (module.model, deepcopy(module).model):
        with pytest.raises(
            SettingsError, match=r"would write LlamaForCausalLM by .* Use `lightning_sft.export_model\(m"
        ):
            model.save_pretrained(tmp_path / "saved")
    export_model(module.model, tmp_path / "exported")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ("exported", "merged"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)


def test_adapters_that_are_there_already_are_not_taken_for_others():
    model = build("tied")
    SFTModule(model, lora=LORA).configure_model()
    SFTModule(model, lora=LORA).configure_model()
    for lora in (LORA | {"r": 2}, None):
        with pytest.raises(ValueError, match=r"`model` has adapters by \{'r': 4.* already, but `lora` is .* Load the"):
            SFTModule(model, lora=lora).configure_model()


def test_adapters_without_peft_are_refused_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingsError, match=r"pip install 'lightning-sft\[lora\]'"):
        SFTModule("anything", lora={"r": 4})


def test_layers_in_float32_beside_half_precision_do_not_prevent_packing():
    model = build("untied", torch.bfloat16).train()
    add_lora(model, LORA | {"modules_to_save": ["lm_head"]})
    assert enable_packing(model) is None
    assert all(module.training for module in model.modules())
