"""Runs that go on from adapters of an earlier one: what is saved, how they continue, and what is exported."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.lora import LORA, build, disturb, logits
from support.processes import Processes
from support.runs import StopAt, train
from transformers import AutoModelForCausalLM

from lightning_sft import HuggingFaceExport, SFTModule
from lightning_sft.export.checkpoint import load_checkpoint
from lightning_sft.export.huggingface import export_model
from lightning_sft.training.checkpoint_weights import InitialWeights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft


def by_peft(folder, adapters):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapters)


@pytest.fixture
def first(tmp_path):
    """A base model, and the adapters that a run has exported."""
    build("untied").save_pretrained(tmp_path / "base")
    module = {"model": str(tmp_path / "base"), "lora": LORA | {"modules_to_save": ["lm_head"]}}
    train(tmp_path / "first", module=module, max_steps=3, callbacks=[HuggingFaceExport(merge_lora=False)])
    return tmp_path / "first" / "huggingface"


def test_a_run_goes_on_from_exported_adapters_continues_exactly_and_is_exported(tmp_path, first):
    lora = {"path": str(first), "lora_dropout": 0.1}
    options = {"module": {"model": str(tmp_path / "base"), "lora": lora, "freeze": ["layers.1"]}, "max_steps": 6}
    whole = train(tmp_path / "whole", **options, callbacks=[HuggingFaceExport(merge_lora=False)])
    for steps in (3, 6):
        parts = train(tmp_path / "parts", **options, callbacks=[StopAt(steps)])
    assert parts["losses"] == whole["losses"]
    assert all(torch.equal(weight, parts["weights"][name]) for name, weight in whole["weights"].items())
    for name, weight in by_peft(tmp_path, first).get_base_model().named_parameters():
        trained = ("lora_" in name or "modules_to_save" in name) and "layers.1" not in name
        assert torch.equal(whole["weights"][name], weight) != trained, name
    card = (tmp_path / "whole" / "huggingface" / "README.md").read_text()
    assert "LoRA from | huggingface" in card

    shutil.rmtree(first)  # the checkpoint needs it no more
    path = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    restored = SFTModule.load_from_checkpoint(path).model
    assert all(torch.equal(weight, whole["weights"][name]) for name, weight in restored.named_parameters())
    expected = logits(restored)
    export_model(load_checkpoint(path)[0], tmp_path / "alone", merge_lora=False)
    for adapters in (tmp_path / "alone", tmp_path / "whole" / "huggingface"):
        assert torch.equal(logits(by_peft(tmp_path, adapters)), expected)
    export_model(load_checkpoint(path)[0], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    naive = by_peft(tmp_path, tmp_path / "alone").merge_and_unload().state_dict()
    assert naive.keys() == merged.keys()
    for name, weight in naive.items():
        torch.testing.assert_close(merged[name], weight, atol=1e-7, rtol=1e-6)


def test_a_model_with_adapters_by_peft_trains_like_adapters_of_the_same_weights(tmp_path):
    def model():
        config = LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        return disturb(get_peft_model(build("tied"), config))

    model().save_pretrained(tmp_path / "adapters")
    lora = {"path": str(tmp_path / "adapters")}
    stored = train(tmp_path / "stored", module={"model": build("tied"), "lora": lora}, max_steps=4)
    for steps in (2, 4):
        callbacks = [HuggingFaceExport(merge_lora=False), StopAt(steps)]
        given = train(tmp_path / "given", module={"model": model()}, max_steps=4, callbacks=callbacks)
    assert given["losses"] == stored["losses"]
    assert all(torch.equal(weight, given["weights"][name]) for name, weight in stored["weights"].items())
    restored = SFTModule.load_from_checkpoint(tmp_path / "given" / "checkpoints" / "last.ckpt", model=build("tied"))
    assert all(torch.equal(weight, given["weights"][name]) for name, weight in restored.model.named_parameters())
    exported = PeftModel.from_pretrained(build("tied"), tmp_path / "given" / "huggingface")
    assert torch.equal(logits(exported), logits(restored.model))


def test_a_new_run_begins_with_a_checkpoint_s_weights_although_a_path_says_what_its_adapters_are(tmp_path, first):
    module = {"model": str(first)}
    train(tmp_path / "second", module=module, max_steps=2)
    path = tmp_path / "second" / "checkpoints" / "last.ckpt"
    sft = SFTModule(**module)
    sft.initial_weights = InitialWeights(path)
    sft.configure_model()
    restored = SFTModule.load_from_checkpoint(path)
    torch.testing.assert_close(sft.model.state_dict(), restored.model.state_dict(), atol=0, rtol=0)
    assert not torch.equal(logits(sft.model), logits(by_peft(tmp_path, first)))


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_go_on_from_the_same_adapters(tmp_path, first, strategy):
    options = {"module": {"model": str(first)}, "max_steps": 4}
    whole = train(tmp_path / "whole", **options)
    for steps in (2, 4):  # the second pair of processes continues
        more = {"strategy": strategy, "accelerator": "cpu", "callbacks": [HuggingFaceExport(), StopAt(steps)]}
        assert Processes(train, tmp_path / "two", **options, **more, world_size=2).wait() == [0, 0]
    result = torch.load(tmp_path / "two" / "result.pt")
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, atol=1e-5, rtol=0)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "huggingface")
    restored = SFTModule.load_from_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt").model
    torch.testing.assert_close(logits(exported), logits(restored), atol=1e-5, rtol=0)
