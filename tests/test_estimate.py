"""Estimates of memory and time against what real optimizers hold and what a real step leaves."""

import json
import sys

import pytest
import torch
from conftest import character_tokenizer, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.cli import main
from lightning_sft.estimate import estimate_run
from lightning_sft.log_probs import score_responses
from lightning_sft.memory import state_memory, step_memory
from lightning_sft.tokenization import Example, collate_padded

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


def empty(**config):
    config = AutoConfig.for_model(**{"model_type": "qwen2", **tiny_config(**config)})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def num_bytes(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("frozen", [(), ("embed_tokens",)], ids=["all", "frozen embeddings"])
def test_what_is_held_between_steps_is_counted_to_the_byte(optimizer, frozen):
    model = tiny_model()
    for name, weight in model.named_parameters():
        weight.requires_grad = not any(part in name for part in frozen)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    real = optimizer(trained)
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    real.step()
    found = state_memory(model.parameters(), optimizer)
    assert found.weights == num_bytes(model.parameters())
    assert found.gradients == num_bytes(weight.grad for weight in trained)
    assert found.optimizer == num_bytes(value for state in real.state.values() for value in state.values())


def test_an_optimizer_that_reads_values_is_not_known():
    assert state_memory(tiny_model().parameters(), torch.optim.Adafactor).optimizer is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_real_forward_pass_saves(checkpointing):
    config = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 97, "num_hidden_layers": 3}
    lengths, responses = [60, 41], [30, 20]
    memory = step_memory(
        empty(**config),
        OPTIMIZERS["AdamW"],
        lengths,
        responses,
        layout="padded",
        gradient_checkpointing=checkpointing,
    )
    config = AutoConfig.for_model(**{"model_type": "qwen2", **tiny_config(**config)})
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    examples = [
        Example(input_ids=[1] * (length + 1), num_prompt_tokens=length + 1 - response)
        for length, response in zip(lengths, responses, strict=True)
    ]
    batch = collate_padded(examples, 0)
    positions = batch["response_mask"].flatten().nonzero().squeeze(-1)
    held = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = tensor  # alive, so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score_responses(model, batch["input_ids"], batch["labels"], positions, normalize_constant=1.0)
    expected = num_bytes(saved.values())
    assert memory.activations == pytest.approx(expected, rel=0.15)
    # Two states of AdamW, gradients and weights are there at the peak whatever else is.
    assert memory.peak >= 4 * memory.state.weights + (0 if checkpointing else 0.5 * expected)


def test_a_share_of_the_model_is_a_share_of_its_memory():
    one, eight = (
        step_memory(empty(), OPTIMIZERS["AdamW"], [20], [20], precision="bf16-mixed", num_shards=number)
        for number in (1, 8)
    )
    assert eight.state.total == pytest.approx(one.state.total / 8, rel=0.01)
    assert one.gathered == 0 < eight.gathered


def test_adapters_leave_the_frozen_weights_without_gradients(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    module = SFTModule(str(tmp_path), lora={"r": 2})
    model = module.empty_model("bf16-mixed")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert model.dtype == torch.bfloat16
    memory = module.step_memory([20], [10], precision="bf16-mixed")
    assert memory.state.gradients == sum(4 * weight.numel() for weight in trained.values())


def test_the_time_is_arithmetic_over_what_devices_do():
    module = SFTModule(tiny_config())
    data = SFTDataModule(character_tokenizer(), [{"prompt": "abc", "output": "defg"}] * 6, batch_size=2)
    found = estimate_run(module, data, {"max_epochs": 2, "devices": 1, "accelerator": "cpu"}, 0.5, 100.0)
    assert found.run["optimizer steps"] == "6"
    assert found.run["tokens"] == "84, 60 of them of responses"  # 12 rows, of 8 tokens with EOS: 7 inputs, 5 labels
    flops = float(found.run["useful arithmetic"].split()[0])
    hours, minutes = (int(word) for word in found.run["time"].split()[:4:2])
    assert hours * 60 + minutes == pytest.approx(flops / 50 / 60, rel=0.01)


def test_the_command_reads_no_weights_and_says_what_it_could_not_see(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "output": "b"}) + "\n")
    monkeypatch.chdir(tmp_path)
    words = ["estimate", "--model.model", "model", "--trainer.accelerator", "gpu", "--trainer.devices", "8"]
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *words, "--data.train_data", "rows.jsonl"])
    main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "all of them trained" in shown
    assert "For 8 CUDA devices, 32-true." in shown
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "missing.jsonl", "--data.max_length", "64"])
    main()
    assert "The data is not looked at: `train_data`" in " ".join(capsys.readouterr().out.split())
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl"}
