"""Memory found out without values against that of real tensors, to the byte where it is exact."""

import pytest
import torch
from support.lora import LORA, build
from support.models import tiny_config, tiny_model

from lightning_sft import SFTModule
from lightning_sft.data.steps.plan import MicrobatchShape
from lightning_sft.data.tokens.collation import collate_packed
from lightning_sft.data.tokens.example import Example
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.precision import Precision
from lightning_sft.model.pretrained import build_empty_model
from lightning_sft.planning.step_memory import Devices, step_memory

LENGTHS, RESPONSES = [40, 30, 20], [10, 20, 5]


def meta_model(**changes):
    return build_empty_model(tiny_config(**changes), {})


def adamw(params):
    return torch.optim.AdamW(params, fused=True)


def kept_by_a_real_forward(model):
    """Bytes of the distinct storages that autograd keeps, but for weights."""
    examples = [
        Example(input_ids=[1] * (n + 1), num_prompt_tokens=n + 1 - r) for n, r in zip(LENGTHS, RESPONSES, strict=True)
    ]
    batch = collate_packed(examples)
    inputs = batch.model_inputs() | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tensors = (batch.input_ids, batch.labels, batch.response_positions)
        score_responses(model, *tensors, normalize_constant=1.0, **inputs)
    for tensor in [*model.parameters(), *model.buffers(), *inputs.values(), batch.input_ids]:
        if torch.is_tensor(tensor):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_what_autograd_keeps_of_a_real_forward_pass():
    from lightning_sft.model.packing import enable_packing

    model = tiny_model(hidden_size=64, intermediate_size=128).train()
    assert enable_packing(model) is None
    expected = kept_by_a_real_forward(model)
    memory = step_memory(
        meta_model(hidden_size=64, intermediate_size=128), adamw, MicrobatchShape(LENGTHS, RESPONSES, 1)
    )
    assert expected <= memory.activations < 1.1 * expected


def test_a_model_that_reads_values_is_refused_in_one_line():
    model = meta_model()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * output.sum().item())
    with pytest.raises(ValueError, match="memory of LlamaForCausalLM under 32-true cannot be found out without"):
        step_memory(model, adamw, MicrobatchShape([5], [2], 1))


def test_checkpointing_keeps_less_and_mixed_precision_adds_casts_of_the_weights():
    model = meta_model(hidden_size=64, intermediate_size=128, num_hidden_layers=5)
    plain, again = (
        step_memory(model, adamw, MicrobatchShape([60] * 4, [20] * 4, 1), gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert again.activations < plain.activations / 3
    assert again.peak < plain.peak
    assert again.state == plain.state
    body = sum(weight.numel() for name, weight in model.named_parameters() if "proj" in name)
    two_tokens = MicrobatchShape([2], [1], 1)
    few = {
        word: step_memory(model, adamw, two_tokens, precision=Precision.of(word)) for word in ("32-true", "bf16-mixed")
    }
    assert few["bf16-mixed"].state == few["32-true"].state
    assert few["bf16-mixed"].activations - few["32-true"].activations == pytest.approx(2 * body, rel=0.1)
    half = step_memory(model, adamw, two_tokens, precision=Precision.of("bf16-true")).state
    assert half.weights == few["32-true"].state.weights / 2


def test_shards_divide_the_state_and_copies_add_buckets():
    model = meta_model()
    one, copied, shared = (
        step_memory(model, adamw, MicrobatchShape([30], [10], 1), devices=devices)
        for devices in (Devices(), Devices(num_copies=4), Devices(num_shards=4))
    )
    assert copied.peak == one.peak + one.state.gradients
    assert shared.state.total == pytest.approx(one.state.total / 4, rel=0.01)
    # Embeddings, head and last norm with gradients; two blocks; a block's gradients, twice.
    block = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    assert shared.gathered == 2 * 4 * (2 * 131 * 16 + 16) + 4 * block


def test_on_cuda_a_tile_of_logits_is_large_and_scored_in_a_single_pass():
    """At the peak the logits' products exist beside what is kept of them; on CPU a small tile of them."""
    model, shape = meta_model(vocab_size=16384), MicrobatchShape([60], [60], 1)
    cpu, cuda = (step_memory(model, adamw, shape, devices=Devices(on_cuda=on_cuda)) for on_cuda in (False, True))
    assert 0.6 < (cuda.peak - cpu.peak) / (60 * 16384 * 4) < 1


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


def test_a_model_that_is_there_already_can_be_estimated():
    model = build("tied", torch.bfloat16)
    empty = SFTModule(model, lora=LORA).builder.build_empty()
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    assert empty.dtype == torch.bfloat16
    assert sum(w.numel() for w in empty.parameters() if not w.requires_grad) == sum(
        w.numel() for w in model.parameters()
    )
