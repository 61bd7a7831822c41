"""Packed documents against one document at a time, in real architectures."""

import pytest
import torch
from support.models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft.data.tokens.collation import collate_packed
from lightning_sft.data.tokens.example import Example
from lightning_sft.model import attention
from lightning_sft.model.attention import VARLEN, packed_inputs, varlen_attention
from lightning_sft.model.checkpointing import ActivationCheckpointing
from lightning_sft.model.packing import enable_packing

LENGTHS = (8, 13, 2, 5)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # in float64 too, norms and rotary angles are computed in float32


def build(model_type, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
        sizes |= {"embd_pdrop": 0.0}
    ids = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3}
    config = AutoConfig.for_model(model_type, **(ids | sizes | settings))
    return AutoModelForCausalLM.from_config(config, attn_implementation=settings.get("attn_implementation", "sdpa"))


MODELS = {
    "qwen2, grouped queries": ("qwen2", {"num_key_value_heads": 2}),
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "mistral, window 4": ("mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    "gemma3, window 4": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),
}


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator) for length in LENGTHS]


def packed(documents):
    return collate_packed([Example(input_ids=ids.tolist(), num_prompt_tokens=1) for ids in documents])


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_give_the_logits_and_gradients_of_each_alone(name):
    model_type, settings = MODELS[name]
    model = build(model_type, **settings).double()
    reference = build(model_type, **settings, attn_implementation="eager").double()
    assert enable_packing(model) is None
    batch = packed(documents())
    given = model(batch.input_ids, use_cache=False, **packed_inputs(model, batch.model_inputs())).logits[0]
    expected = torch.cat([reference(ids[None, :-1], use_cache=False).logits[0] for ids in documents()])
    torch.testing.assert_close(given, expected, **CLOSE)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    given.backward(upstream)
    expected.backward(upstream)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm() + 1e-9


@pytest.mark.parametrize("name", ["qwen2, grouped queries", "mistral, window 4"])
@pytest.mark.parametrize("longest", [0, 1024])
def test_half_precision_on_cpu_stays_as_close_as_half_precision_can(name, longest, monkeypatch):
    monkeypatch.setattr("lightning_sft.model.attention._LONGEST_BY_PRODUCTS", longest)
    model_type, settings = MODELS[name]
    generator = torch.Generator().manual_seed(3)
    heads = [torch.randn(1, n, 14, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]
    layer = build(model_type, **settings).model.layers[0].self_attn
    bounds = torch.tensor([0, 9, 14], dtype=torch.int32)
    kwargs = {"cu_seq_lens_q": bounds, "sliding_window": settings.get("sliding_window")}
    upstream = torch.randn(1, 14, 4, 8, generator=generator, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        states = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in heads]
        attended, _ = varlen_attention(layer, *states, None, scaling=0.4, **kwargs)
        results.append([attended, *torch.autograd.grad(attended, states, upstream.bfloat16().to(dtype))])
    for exact, given in zip(*results, strict=True):
        assert given.dtype == torch.bfloat16
        assert (given - exact).norm() < 0.01 * exact.norm()


def test_mixed_precision_attends_in_half_precision(monkeypatch):
    """Rotary embeddings make float32 of queries and keys; kernels for half precision would be passed by."""
    model, batch = build("qwen2", num_key_value_heads=2).float(), packed(documents())
    assert enable_packing(model, torch.bfloat16) is None
    inputs = packed_inputs(model, batch.model_inputs())
    exact = model(batch.input_ids, use_cache=False, **inputs).logits
    seen, original = [], attention._attend_each

    def watched(*states):
        seen.extend(state.dtype for state in states[:3])
        return original(*states)

    monkeypatch.setattr(attention, "_attend_each", watched)
    with torch.autocast("cpu", torch.bfloat16):
        given = model(batch.input_ids, use_cache=False, **inputs).logits
    assert seen == [torch.bfloat16] * 6
    assert (given - exact).norm() < 0.02 * exact.norm()


def test_a_shape_that_the_kernel_for_half_precision_does_not_take_is_found_out(monkeypatch):
    def refuse(*_):
        raise RuntimeError("head sizes above 256 are not supported")

    monkeypatch.setattr(attention, "_attend_by_products", refuse)
    model = build("qwen2", num_key_value_heads=2).float()
    assert enable_packing(model, torch.bfloat16).endswith(
        "does not run on packed documents: head sizes above 256 are not supported"
    )
    assert model.config._attn_implementation == "sdpa"
    assert enable_packing(model) is None


def test_a_pretrained_checkpoint_reads_packed_stories_as_each_alone(shared_data):
    model = AutoModelForCausalLM.from_pretrained(shared_data / "stories260k").double()
    generator = torch.Generator().manual_seed(0)
    stories = [torch.randint(3, 512, (length,), generator=generator) for length in (200, 31, 77)]
    expected = torch.cat([model(ids[None, :-1], use_cache=False).logits[0] for ids in stories])
    assert enable_packing(model) is None
    batch = packed(stories)
    given = model(batch.input_ids, use_cache=False, **packed_inputs(model, batch.model_inputs())).logits[0]
    torch.testing.assert_close(given, expected, **CLOSE)


def test_a_call_without_a_mask_of_one_element_is_slower_but_the_same():
    """As users of flash attention would call it: `transformers` then builds a mask, which is not needed."""
    model, batch = build("mistral", num_key_value_heads=2, sliding_window=4), packed(documents())
    assert enable_packing(model) is None
    with torch.no_grad():
        lean, plain = (
            model(batch.input_ids, use_cache=False, **inputs).logits
            for inputs in (packed_inputs(model, batch.model_inputs()), batch.model_inputs())
        )
    assert torch.equal(lean, plain)


def test_no_mask_of_the_whole_row_is_ever_built(monkeypatch):
    model, batch = build("qwen2", num_key_value_heads=2), packed(documents())
    assert enable_packing(model) is None
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, mask=None, *args, **options):
        shapes.append((query.shape[2], key.shape[2], mask))
        return original(query, key, value, mask, *args, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    model(batch.input_ids, use_cache=False, **packed_inputs(model, batch.model_inputs()))
    assert shapes == [(length - 1, length - 1, None) for length in LENGTHS] * 2  # in each layer


@pytest.mark.parametrize("name", MODELS)
def test_anything_not_packed_is_sdpa_to_the_letter(name):
    """Left padding, a right-padded batch longer than the window without any mask, and generation."""
    model_type, settings = MODELS[name]
    ours, sdpa = (build(model_type, **settings).eval() for _ in range(2))
    assert enable_packing(ours) is None
    assert ours.config._attn_implementation == VARLEN
    ids = torch.randint(2, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    left = torch.ones(3, 12, dtype=torch.int64)
    left[0, :5] = left[1, :2] = 0
    with torch.no_grad():
        for options in ({"attention_mask": left}, {"use_cache": False}, {}):
            assert torch.equal(ours(ids, **options).logits, sdpa(ids, **options).logits)
        answers = [
            model.generate(ids, attention_mask=left, max_new_tokens=8, do_sample=False) for model in (ours, sdpa)
        ]
    assert torch.equal(*answers)


def test_dropout_is_drawn_in_training_and_documents_stay_apart():
    model = tiny_model(attention_dropout=0.5).train()
    assert enable_packing(model) is None
    assert model.training
    first, other, second = (torch.arange(5) + start for start in (10, 30, 50))

    def second_half(before):
        torch.manual_seed(3)
        batch = packed([before, second])
        return model(batch.input_ids, use_cache=False, **packed_inputs(model, batch.model_inputs())).logits[0, 4:]

    assert torch.equal(second_half(first), second_half(other))
    torch.manual_seed(4)
    assert not torch.equal(model(second[None], use_cache=False).logits, model(second[None], use_cache=False).logits)


def test_gradient_checkpointing_keeps_documents_apart_when_it_computes_again():
    batch, gradients = packed(documents()), []
    for checkpointing in (False, True):
        model = build("llama").double().train()
        assert enable_packing(model) is None
        if checkpointing:
            ActivationCheckpointing(True).enable(model)
        inputs = packed_inputs(model, batch.model_inputs())
        model(batch.input_ids, use_cache=False, **inputs).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, **CLOSE)


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("qwen2", {"attn_implementation": "eager"}, "Qwen2ForCausalLM uses `eager` attention"),
        ("bloom", {"attn_implementation": "eager", "n_head": 4}, "BloomForCausalLM uses `eager` attention"),
        ("gemma2", {"attn_implementation": "eager", "head_dim": 8}, "Gemma2ForCausalLM uses `eager` attention"),
        ("falcon", {}, "FalconForCausalLM does not use plain causal attention"),
        ("llama4_text", {"num_local_experts": 2, "head_dim": 8}, "does not use plain causal attention"),
        ("jamba", {"num_experts": 2}, "JambaForCausalLM lets packed documents see each other"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of architectures that miss their kernels
def test_a_model_that_would_mix_documents_is_refused_and_left_as_it_was(model_type, settings, words):
    model = build(model_type, **settings)
    attention = model.config._attn_implementation
    assert words in enable_packing(model)
    assert model.config._attn_implementation == attention


def test_a_model_whose_body_carries_something_along_is_caught_by_trying():
    model = tiny_model()

    class Carry(nn.Module):
        """Adds to each position what stands before it in the row."""

        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, hidden):
            return self.norm(hidden + hidden.cumsum(dim=1))

    model.model.layers[1].input_layernorm = Carry(model.model.layers[1].input_layernorm)
    assert enable_packing(model) == "LlamaForCausalLM lets packed documents see each other"


def test_trying_out_leaves_modes_and_random_state_alone():
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert enable_packing(model) is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_softcapped_attention_is_refused_by_name():
    states = torch.zeros(1, 2, 4, 8)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"Linear attends with `softcap`\. Set `layout: padded`"):
        varlen_attention(nn.Linear(1, 1), states, states, states, None, cu_seq_lens_q=bounds, softcap=30.0)


def test_the_name_of_the_attention_is_not_saved_with_the_model(tmp_path):
    model = tiny_model()
    enable_packing(model)
    model.save_pretrained(tmp_path)
    assert VARLEN not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["qwen2, grouped queries", "mistral, window 4"])
def test_variable_length_attention_on_cuda_equals_one_document_at_a_time(name):
    """As close to float64 as documents that bfloat16 is given one by one, with gradients."""
    model_type, settings = MODELS[name]
    settings = settings | {"hidden_size": 128}
    model = build(model_type, **settings).to("cuda", torch.bfloat16)
    assert enable_packing(model) is None
    batch = packed(documents()).to("cuda")
    given = model(batch.input_ids, use_cache=False, **packed_inputs(model, batch.model_inputs())).logits[0]
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        reference = build(model_type, **settings, attn_implementation="eager").to("cuda", dtype)
        logits = torch.cat([reference(ids[None, :-1].cuda(), use_cache=False).logits[0] for ids in documents()])
        found.append([logits, *torch.autograd.grad((logits**2).mean(), list(reference.parameters()))])
    ours = [given, *torch.autograd.grad((given**2).mean(), list(model.parameters()))]
    for each, precise, alone in zip(ours, *found, strict=True):
        assert (each - precise).norm() < 2 * (alone - precise).norm()
