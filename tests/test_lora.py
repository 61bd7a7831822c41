"""Adapters beside frozen weights: what they compute, what is trained and saved, and the plain model they make."""

import lightning as L
import pytest
import torch
from conftest import tiny_config
from training import ROWS, Processes, train
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft import HuggingFaceExport, SFTModule
from lightning_sft.lora import add_lora, plain_weights

MODELS = {
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2"},
}
IDS = torch.arange(40).view(2, 20)
LORA = {"r": 4, "lora_alpha": 8}


def build(name, dtype=torch.float32):
    torch.manual_seed(3)
    config = tiny_config(num_key_value_heads=1, bos_token_id=None, eos_token_id=128, pad_token_id=128) | MODELS[name]
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class StopAt(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop |= trainer.global_step >= self.step


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def disturb(model):
    """Adapters begin as zeros; here they are something."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


def trained(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


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


def test_only_adapters_are_trained_and_saved_and_a_run_continues_to_the_last_bit(tmp_path):
    base = tmp_path / "base"
    build("tied").save_pretrained(base)
    options = {"module": {"model": str(base), "lora": LORA | {"lora_dropout": 0.1}}, "data": {"val_data": ROWS[:5]}}
    whole = train(tmp_path / "whole", **options, max_steps=6)
    train(tmp_path / "parts", **options, max_steps=6, callbacks=[StopAt(3)])
    parts = train(tmp_path / "parts", **options, max_steps=6)
    assert parts["losses"] == whole["losses"]
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, parts["weights"][name]), name
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in whole["weights"].items():
        if ".lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name

    path = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in whole["weights"] if ".lora_" in name}
    restored = SFTModule.load_from_checkpoint(path).model
    for name, weight in restored.named_parameters():
        assert torch.equal(weight, whole["weights"][name]), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp, one file"])
def test_two_processes_train_the_same_adapters_and_the_folder_is_the_merged_model(tmp_path, strategy):
    base = tmp_path / "base"
    build("tied").save_pretrained(base)
    options = {"module": {"model": str(base), "lora": LORA}, "max_steps": 4}
    whole = train(tmp_path / "whole", **options, callbacks=[HuggingFaceExport()])
    two = tmp_path / "two"
    for steps in (2, 4):  # the second pair of processes continues
        more = {"strategy": strategy, "accelerator": "cpu", "callbacks": [HuggingFaceExport(), StopAt(steps)]}
        assert Processes(train, two, **options, **more, world_size=2).wait() == [0, 0]
    result = torch.load(two / "result.pt")
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, atol=1e-5, rtol=0)
    own, other = (AutoModelForCausalLM.from_pretrained(run / "huggingface") for run in (tmp_path / "whole", two))
    torch.testing.assert_close(logits(own), logits(other), atol=1e-5, rtol=0)
    restored = SFTModule.load_from_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt").model
    torch.testing.assert_close(logits(own), logits(restored), atol=1e-5, rtol=0)
    saved = two / "checkpoints" / "last.ckpt"
    size = sum(path.stat().st_size for path in saved.rglob("*.distcp")) if saved.is_dir() else saved.stat().st_size
    frozen = sum(weight.nbytes for name, weight in whole["weights"].items() if ".lora_" not in name)
    assert size < frozen, (size, frozen)
