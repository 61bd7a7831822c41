"""Adapters beside weights that bitsandbytes holds in 4 bits."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision
from support.lora import IDS, LORA, MODELS, build, disturb, logits
from support.models import character_tokenizer, tiny_config
from support.runs import ROWS, StepLog, adamw, read_log, train
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lightning_sft import HuggingFaceExport, LastCheckpoint, SFTDataModule, SFTModule
from lightning_sft.model.lora import add_lora
from lightning_sft.model.quantization import is_quantized


def test_quantised_weights_stay_and_their_adapters_learn(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, run = tmp_path / "base", tmp_path / "run"
    torch.manual_seed(3)
    config = tiny_config(hidden_size=64, intermediate_size=64) | MODELS["untied"]
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    kwargs = {"quantization_config": quantization}
    module = SFTModule(str(base), lora=LORA, model_kwargs=kwargs, optimizer=adamw)
    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=8)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    log = StepLog(tmp_path / "steps.jsonl")
    callbacks = [log, LastCheckpoint(), HuggingFaceExport()]
    trainer = L.Trainer(accelerator="cpu", max_steps=8, default_root_dir=run, callbacks=callbacks, **options)
    trainer.fit(module, data)
    losses = [line["train/loss"] for line in read_log(log.path)]
    assert losses[-1] < losses[0] - 0.1
    kinds = {name: weight.dtype for name, weight in module.model.named_parameters()}
    assert kinds["model.layers.0.mlp.up_proj.base_layer.weight"] == torch.uint8
    assert kinds["model.layers.0.mlp.up_proj.lora_A.default.weight"] == torch.float32
    assert kinds["lm_head.weight"] == torch.float32
    assert module.why_not_packed is None
    merged = AutoModelForCausalLM.from_pretrained(run / "huggingface")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), logits(module.model), atol=1e-4, rtol=0)
    path = run / "checkpoints" / "last.ckpt"
    assert all(".lora_" in name for name in torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(logits(SFTModule.load_from_checkpoint(path).model), logits(module.model))


def build_in_4_bit(folder):
    config = tiny_config(hidden_size=64, intermediate_size=64, vocab_size=128, eos_token_id=None, bos_token_id=None)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)


def test_an_evaluation_changes_neither_4_bit_weights_nor_their_adapters_gradients(tmp_path):
    """On CPUs with bfloat16 arithmetic bitsandbytes packs weights, for which its kernel has no gradient."""
    pytest.importorskip("bitsandbytes")
    model = build_in_4_bit(tmp_path)
    add_lora(model, LORA)
    disturb(model)
    found = []
    for _ in range(2):
        model.train()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append([loss, *(weight.grad.clone() for weight in model.parameters() if weight.requires_grad)])
        model.zero_grad()
        logits(model)
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))
    assert all(each.abs().sum() > 0 for each in found[0])


def test_4_bit_weights_that_are_packed_for_inference_are_refused(tmp_path):
    if not pytest.importorskip("bitsandbytes.functional").has_avx512bf16():
        pytest.skip("bitsandbytes packs weights on CPUs with bfloat16 arithmetic alone")
    model = build_in_4_bit(tmp_path)
    logits(model)
    with pytest.raises(ValueError, match=r"bitsandbytes has packed its 4-bit weights.*Load the model anew"):
        add_lora(model, LORA)


def test_what_would_quantise_the_adapters_or_train_quantised_weights_is_refused(tmp_path):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 1}
    trainer = L.Trainer(default_root_dir=tmp_path, **options)
    trainer.strategy.precision_plugin = BitsandbytesPrecision("nf4", torch.float32)  # from the user on CUDA alone
    with pytest.raises(ValueError, match=r"Set `model.model_kwargs.quantization_config` instead"):
        trainer.fit(SFTModule(build("tied"), lora=LORA), SFTDataModule(character_tokenizer(), ROWS))
    quantization = {"load_in_4bit": True}
    build("untied").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="quantised by bitsandbytes, and such weights can only train `lora` adapters"):
        SFTModule(str(tmp_path / "base"), model_kwargs={"quantization_config": quantization}).configure_model()


def test_a_quantisation_given_as_an_object_does_not_end_up_in_the_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")
    build("untied").save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    module = {"model": str(tmp_path / "base"), "lora": LORA, "model_kwargs": {"quantization_config": quantization}}
    train(tmp_path / "run", module=module, max_steps=1)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["module_hyper_parameters"]["model_kwargs"]
    assert saved["quantization_config"]["load_in_4bit"] is True
    assert is_quantized(SFTModule.load_from_checkpoint(path).model)
