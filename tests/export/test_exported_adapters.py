"""Exports of models with adapters: merged, or the adapters alone."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.lora import LORA, build, logits
from support.runs import train
from transformers import AutoModelForCausalLM

from lightning_sft import HuggingFaceExport, SFTModule
from lightning_sft.cli.app import main
from lightning_sft.export.checkpoint import load_checkpoint
from lightning_sft.export.huggingface import export_model
from lightning_sft.model.adapter_weights import plain_weights


def trained(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
def test_an_adapter_alone_is_for_peft_and_gives_the_same_logits(tmp_path, monkeypatch):
    base, run = tmp_path / "base", tmp_path / "run"
    build("untied", torch.bfloat16).save_pretrained(base)
    export = HuggingFaceExport(merge_lora=False)
    module = {"model": str(base), "lora": LORA | {"modules_to_save": ["lm_head"]}, "model_kwargs": {}}
    train(run, module=module, max_steps=3, precision="bf16-mixed", callbacks=[export])
    module = SFTModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert module.model.dtype == torch.bfloat16  # as it is stored
    assert trained(module.model)["lm_head.modules_to_save.default.weight"].dtype == torch.float32
    base_model = AutoModelForCausalLM.from_pretrained(base)
    loaded = PeftModel.from_pretrained(base_model, run / "huggingface")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(loaded), logits(module.model))
    card = (run / "huggingface" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained(" in card
    assert "| LoRA | r 4, lora_alpha 8" in card
    assert not (run / "huggingface" / "model.safetensors").exists()

    words = ["--ckpt_path", run / "checkpoints" / "last.ckpt", "--tokenizer", run / "huggingface"]
    monkeypatch.setattr("sys.argv", ["lightning-sft", "export", *map(str, words), "--output", str(tmp_path / "out")])
    main()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    expected = plain_weights(module.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.state_dict().items())


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")  # by peft
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tied", {"modules_to_save": ["model.embed_tokens"]}),
        ("gpt2", {"modules_to_save": ["lm_head"], "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("untied", {"init_lora_weights": "pissa_niter_4"}),
    ],
    ids=str,
)
def test_a_checkpoint_is_exported_with_what_was_trained_beside_its_adapters(tmp_path, name, settings):
    """Tied weights share memory; PiSSA changes the frozen weights by random numbers."""
    build(name).save_pretrained(tmp_path / "base")
    module = {"model": str(tmp_path / "base"), "lora": LORA | settings, "seed": 3}
    alone = "init_lora_weights" not in settings
    train(tmp_path, module=module, max_steps=3, callbacks=[HuggingFaceExport("live", merge_lora=not alone)])
    path = tmp_path / "checkpoints" / "last.ckpt"
    expected = logits(SFTModule.load_from_checkpoint(path).model)
    assert (expected - logits(build(name))).abs().max() > 0.01
    export_model(load_checkpoint(path)[0], tmp_path / "merged")
    folders = ["merged"] if alone else ["merged", "live"]
    for merged in folders:
        given = logits(AutoModelForCausalLM.from_pretrained(tmp_path / merged))
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    if not alone:
        with pytest.raises(ValueError, match=r"`lora\.init_lora_weights` is 'pissa_niter_4', which also changes"):
            export_model(load_checkpoint(path)[0], tmp_path / "alone", merge_lora=False)
        return
    export_model(load_checkpoint(path)[0], tmp_path / "alone", merge_lora=False)
    for adapter in ("live", "alone"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / adapter)), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
@pytest.mark.parametrize("merge_lora", [True, False])
def test_a_model_in_the_wrapper_of_peft_is_exported_with_its_adapters(tmp_path, merge_lora):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(build("untied"), config)
    export_model(wrapped, tmp_path / "out", merge_lora=merge_lora)
    if merge_lora:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        loaded = PeftModel.from_pretrained(build("untied"), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(wrapped))


def test_an_export_of_adapters_needs_adapters(tmp_path):
    with pytest.raises(ValueError, match="`merge_lora` is false, but the model has no adapters"):
        train(tmp_path, callbacks=[HuggingFaceExport(merge_lora=False)], max_steps=1)


def test_adapters_of_an_unnamed_model_are_loaded_beside_that_model(tmp_path):
    result = train(tmp_path, module={"model": build("gpt2"), "lora": LORA}, max_steps=2)
    path = tmp_path / "checkpoints" / "last.ckpt"
    restored = SFTModule.load_from_checkpoint(path, model=build("gpt2")).model
    assert all(torch.equal(weight, result["weights"][name]) for name, weight in restored.named_parameters())
    with pytest.raises(ValueError, match="adapters of a model without a name"):
        load_checkpoint(path)
    checkpoint = torch.load(path)
    checkpoint["module_hyper_parameters"]["model"] = "./moved"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"adapters of the model './moved', which is not there. Load it by"):
        load_checkpoint(path)
