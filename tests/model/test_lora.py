"""Adapters beside frozen weights: what they compute, what is trained and saved, and the plain model they make."""

import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision
from peft import PeftModel
from support.models import character_tokenizer, tiny_config
from support.runs import ROWS, Processes, StepLog, adamw, read_log, train
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lightning_sft import HuggingFaceExport, LastCheckpoint, SettingsError, SFTDataModule, SFTModule
from lightning_sft.cli.app import main
from lightning_sft.data.plan import MicrobatchShape
from lightning_sft.export.checkpoint import load_checkpoint
from lightning_sft.export.huggingface import export_model
from lightning_sft.model.adapter_weights import plain_weights
from lightning_sft.model.attention import enable_packing
from lightning_sft.model.lora import add_lora
from lightning_sft.model.precision import Precision
from lightning_sft.model.quantization import is_quantized
from lightning_sft.planning.step_memory import step_memory

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
    if saved.is_dir():
        names = FileSystemReader(saved).read_metadata().state_dict_metadata
        names = {name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")}
    else:
        names = set(torch.load(saved, weights_only=True)["state_dict"])
    assert names == {f"model.{name}" for name in whole["weights"] if ".lora_" in name}


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


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "`lora` has `rank`, which cannot be set. These can: `r`, `lora_alpha`"),
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


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_an_average_of_adapters_goes_on_too(tmp_path):
    options = {"module": {"model": build("tied"), "lora": LORA}, "max_steps": 4}
    callbacks = [EMAWeightAveraging(use_buffers=False, decay=0.5)]
    train(tmp_path / "parts", **options, callbacks=[*callbacks, StopAt(2)])
    options["module"]["model"] = build("tied")
    parts = train(tmp_path / "parts", **options, callbacks=[EMAWeightAveraging(use_buffers=False, decay=0.5)])
    options["module"]["model"] = build("tied")
    whole = train(tmp_path / "whole", **options, callbacks=[EMAWeightAveraging(use_buffers=False, decay=0.5)])
    assert parts["losses"] == whole["losses"]
    assert all(torch.equal(weight, parts["weights"][name]) for name, weight in whole["weights"].items())


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


def test_layers_in_float32_beside_half_precision_do_not_prevent_packing():
    model = build("untied", torch.bfloat16).train()
    add_lora(model, LORA | {"modules_to_save": ["lm_head"]})
    assert enable_packing(model) is None
    assert all(module.training for module in model.modules())


def test_an_estimate_counts_frozen_weights_as_stored_and_gradients_of_adapters_alone(tmp_path):
    build("tied", torch.bfloat16).save_pretrained(tmp_path)
    module = SFTModule(str(tmp_path), lora=LORA)
    model = module.builder.build_empty(Precision.of("bf16-mixed"))
    assert model.dtype == torch.bfloat16
    adapters = sum(4 * weight.numel() for weight in model.parameters() if weight.requires_grad)
    shape = MicrobatchShape([20], [10], 1)
    memory = step_memory(model, adamw, shape, precision=Precision.of("bf16-mixed")).state
    assert memory.gradients == adapters
    assert memory.weights == adapters + sum(2 * weight.numel() for weight in build("tied").parameters())


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    train(tmp_path, module={"model": build("tied"), "lora": LORA}, max_steps=1)
    for lora in (LORA | {"lora_alpha": 16}, None):
        with pytest.raises(
            ValueError, match=r"The checkpoint was trained with `lora` = .*'lora_alpha': 8.*, but it is"
        ):
            train(tmp_path, module={"model": build("tied"), "lora": lora}, max_steps=2)


def test_adapters_on_top_of_a_model_of_another_name_are_warned_of(tmp_path):
    for name in ("base", "instruct"):
        build("tied").save_pretrained(tmp_path / name)
    train(tmp_path, module={"model": str(tmp_path / "base"), "lora": LORA}, max_steps=1)
    train(tmp_path, module={"model": str(tmp_path / "base"), "lora": LORA}, max_steps=2)  # says nothing
    with pytest.warns(UserWarning, match=r"adapters are of the model '.*base', but `model` is '.*instruct' here"):
        train(tmp_path, module={"model": str(tmp_path / "instruct"), "lora": LORA}, max_steps=3)


def test_a_quantisation_given_as_an_object_does_not_end_up_in_the_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")
    build("untied").save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    module = {"model": str(tmp_path / "base"), "lora": LORA, "model_kwargs": {"quantization_config": quantization}}
    train(tmp_path / "run", module=module, max_steps=1)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["hyper_parameters"]["model_kwargs"]
    assert saved["quantization_config"]["load_in_4bit"] is True
    assert is_quantized(SFTModule.load_from_checkpoint(path).model)


def test_a_model_that_is_there_already_can_be_estimated():
    model = build("tied", torch.bfloat16)
    empty = SFTModule(model, lora=LORA).builder.build_empty()
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    assert empty.dtype == torch.bfloat16
    assert sum(w.numel() for w in empty.parameters() if not w.requires_grad) == sum(
        w.numel() for w in model.parameters()
    )
