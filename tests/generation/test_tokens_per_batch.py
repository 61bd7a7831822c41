"""How many tokens a batch has where nobody says: checked against the caches that models fill."""

from types import SimpleNamespace

import pytest
import torch
from support.architectures import tiny_architecture
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.generation.batches import tokens_per_batch
from lightning_sft.generation.responses import ResponseRequest

SMALL = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = [
    SMALL | {"model_type": "llama", "intermediate_size": 64, "num_key_value_heads": 2},
    SMALL | {"model_type": "qwen3", "intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 32},
    {"model_type": "gpt2", "vocab_size": 64, "n_embd": 48, "n_layer": 3, "n_head": 4},
]


def request(num_prompt_tokens: int, max_new_tokens: int) -> ResponseRequest:
    return ResponseRequest(Prompt(0, "", None), 0, [1] * num_prompt_tokens, max_new_tokens)


LONG = [request(10**6, 10)]  # of which few have as many tokens: their logits are nothing


def cached_bytes(model: torch.nn.Module, num_tokens: int) -> int:
    output = model(torch.ones(1, num_tokens, dtype=torch.int64), use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values  # the second in earlier `transformers`
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def on_a_device(model, memory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_keys_and_values_take_a_sixteenth_of_a_cuda_devices_memory(config, dtype, monkeypatch):
    settings = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype)
    memory = 16 * cached_bytes(model, num_tokens=500)
    assert tokens_per_batch(on_a_device(model, memory, monkeypatch), LONG) == 500


@pytest.mark.parametrize("model_type", ["falcon", "deepseek_v3", "gemma3_text"])
def test_models_share_or_compress_keys_and_values(model_type, monkeypatch):
    model = tiny_architecture(model_type).eval()
    memory = 16 * cached_bytes(model, num_tokens=5)
    assert tokens_per_batch(on_a_device(model, memory, monkeypatch), LONG) == 5


@pytest.mark.parametrize("model_type", ["mamba", "lfm2", "falcon_h1"])
def test_states_of_sequences_do_not_grow_with_their_tokens(model_type, monkeypatch):
    assert tokens_per_batch(on_a_device(tiny_architecture(model_type), 2**50, monkeypatch), LONG) == 32_768


def test_keys_and_values_are_those_of_mixed_precision(monkeypatch):
    settings = dict(CONFIGS[0])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).train()
    with torch.autocast("cpu", torch.bfloat16):
        memory = 16 * cached_bytes(model, num_tokens=500)
        assert tokens_per_batch(on_a_device(model, memory, monkeypatch), LONG) == 500
    assert model.training


def test_logits_of_short_rows_are_in_that_memory_too(monkeypatch):
    settings = CONFIGS[0] | {"vocab_size": 4000}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    rows = [request(6, 4), request(9, 4), request(1, 0)]  # of ten tokens, thirteen, and without a response
    memory = 16 * 7 * (cached_bytes(model, num_tokens=10) + 4 * 4000)
    assert tokens_per_batch(on_a_device(model, memory, monkeypatch), rows) == 7 * 10


def test_a_sharded_model_which_scores_a_batch_in_one_pass_has_the_number_of_a_cpu(monkeypatch):
    monkeypatch.setattr("lightning_sft.generation.batches.is_sharded", lambda model: True)
    assert tokens_per_batch(on_a_device(tiny_architecture("llama"), 2**50, monkeypatch), LONG) == 32_768


def test_a_cpu_has_the_same_number_for_every_model(monkeypatch):
    settings = dict(CONFIGS[0])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    assert tokens_per_batch(model, LONG) == 32_768
