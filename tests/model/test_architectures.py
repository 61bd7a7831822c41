"""One member of each family of architectures: what it is trained with is each row alone, or it is refused."""

import copy

import pytest
import torch
from support.architectures import tiny_architecture
from support.flash import NAIVE_FLASH, attend_by_naive_flash
from support.sweep import ROWS, difference, first_step, naive_step

from lightning_sft.model.linear_head import find_linear_head
from lightning_sft.model.lora import add_lora, not_adapted
from lightning_sft.model.rotary import keep_rotary_by_row, positions_by_row

pytestmark = pytest.mark.filterwarnings("ignore")  # of architectures that miss their kernels

# Type, settings, and why it is padded (None: packed).
FAMILIES = {
    "llama": ("llama", {}, None),
    "windows that are handed over": ("mistral", {"sliding_window": 8}, None),
    "a window in the mask alone": (
        "phimoe",
        {"sliding_window": 4},
        "has a window of 4 tokens that only its mask applies",
    ),
    "a window longer than what is tried": (
        "phimoe",
        {"sliding_window": 40},
        "has a window of 40 tokens that only its mask applies",
    ),
    "some layers with a window": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "has a window of 8 tokens that only its mask applies",
    ),
    "positions counted from padding_idx": ("roberta", {}, "processes packed documents differently from separate ones"),
    "recurrent layers": ("jamba", {}, "lets packed documents see each other"),
    "convolutions": ("lfm2", {}, "lets packed documents see each other"),
    "state space": ("granitemoehybrid", {}, "lets packed documents see each other"),
    "a view of what is attended": ("jetmoe", {}, None),
}


def check_first_step(model, rows=ROWS, tolerance=2e-5, **options):
    """Loss and gradients against each row alone through the plain model."""
    model.train()
    loss, gradients = naive_step(model, rows)
    sft, given_loss, given = first_step(copy.deepcopy(model), rows, **options)
    assert given_loss == pytest.approx(loss, rel=tolerance)
    assert difference(given, gradients) < tolerance
    return sft


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_is_that_of_each_row_alone(family):
    model_type, settings, why_padded = FAMILIES[family]
    sft = check_first_step(tiny_architecture(model_type, **settings), gradient_accumulation_steps=2)
    assert (sft.why_not_packed or "none").endswith(why_padded or "none")


RECURRENT = ("jamba", "granitemoehybrid", "bamba", "nemotron_h", "lfm2", "minimax")


@pytest.mark.parametrize("model_type", ["llama", "mistral", *RECURRENT])
def test_what_flash_attention_keeps_apart_other_layers_may_mix(model_type):
    model = attend_by_naive_flash(tiny_architecture(model_type))
    sft = check_first_step(model)
    assert sft.model.config._attn_implementation == NAIVE_FLASH
    if model_type in RECURRENT:
        assert sft.why_not_packed.endswith("lets packed documents see each other")
    else:
        assert sft.why_not_packed is None


NOT_CAUSAL = {
    "bert": {"is_decoder": False},
    "roberta": {"is_decoder": False},
    "cpmant": {},
    "xlm": {"causal": False},
    "gemma3_text": {"use_bidirectional_attention": True},
}


@pytest.mark.parametrize("model_type", NOT_CAUSAL)
def test_a_model_that_sees_what_follows_is_refused(model_type):
    with pytest.raises(ValueError, match="whose logits change with the tokens that follow: it would see the response"):
        first_step(tiny_architecture(model_type, **NOT_CAUSAL[model_type]))


def longrope(**settings):
    """Other frequencies from 17 inputs on."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16} | settings
    factors = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [3.0, 5.0, 9.0, 20.0]}
    return {"rope_parameters": rope | factors, "original_max_position_embeddings": 16}


BY_LENGTH = {
    "LongRoPE": ("phi3", longrope() | {"sliding_window": None}),
    "LongRoPE, magnitudes too": ("phimoe", longrope(short_mscale=1.1, long_mscale=1.3) | {"sliding_window": None}),
    "dynamic NTK": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
}


@pytest.mark.parametrize("options", [{}, {"layout": "padded"}, {"gradient_accumulation_steps": 3}], ids=str)
@pytest.mark.parametrize("name", BY_LENGTH)
def test_each_row_gets_the_rotary_frequencies_that_it_gets_alone(name, options):
    model_type, settings = BY_LENGTH[name]
    model = tiny_architecture(model_type, **settings)
    sft = check_first_step(model, **options)
    assert sft.why_not_packed is None


@pytest.mark.parametrize("name", BY_LENGTH)
def test_without_that_a_longer_row_beside_it_would_change_a_row(name):
    model_type, settings = BY_LENGTH[name]
    model, short = tiny_architecture(model_type, **settings).eval(), 10 + torch.arange(9)
    beside = torch.stack([torch.cat([short, short.new_zeros(20)]), 10 + torch.arange(29)])
    with torch.no_grad():
        alone = model(short[None], use_cache=False).logits[0]
        in_a_batch = [model(beside, use_cache=False).logits[0, :9]]
        keep_rotary_by_row(model)
        positions = positions_by_row(model, [9, 29], 29)
        in_a_batch.append(model(beside, position_ids=positions, use_cache=False).logits[0, :9])
    assert [(given - alone).norm() > 1e-3 * alone.norm() for given in in_a_batch] == [True, False]


HEADS = {
    "a multiplier of its own name": ("falcon_h1", {"lm_head_multiplier": 0.3}, (0.3, None)),
    "multiplied where Granite divides": ("hyperclovax", {"logits_scaling": 0.7}, (0.7, None)),
    "a cap of another name": ("recurrent_gemma", {"logits_soft_cap": 5.0}, (1.0, 5.0)),
    "hidden states that are scaled": ("minicpm3", {"dim_model_base": 8}, (1.0, None)),
    "no base model by its name": ("llama4_text", {}, (1.0, None)),
    "products that are cut": ("inkling_text", {"unpadded_vocab_size": 131}, (1.0, None)),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_taken_apart_by_what_the_model_makes_of_it(kind):
    model_type, settings, expected = HEADS[kind]
    model = tiny_architecture(model_type, **settings)
    head = find_linear_head(model)
    assert (head.transform.scale, head.transform.softcap) == expected
    assert head.vocab_size == settings.get("unpadded_vocab_size")
    check_first_step(tiny_architecture(model_type, **settings))


def test_where_logits_are_kept_this_is_said(caplog):
    with caplog.at_level("INFO"):
        check_first_step(tiny_architecture("dory"))
    assert "Logits are stored: DoryForCausalLM computes them in an unknown way." in caplog.text


@pytest.mark.parametrize(
    "model_type", ["llama", "llama4_text", "deepseek_v4", "mamba", "mamba2", "falcon_h1", "falcon"]
)
def test_adapters_with_default_targets_train_as_each_row_alone(model_type):
    settings = {"r": 2, "init_lora_weights": False}
    adapted = tiny_architecture(model_type).train()
    plain = copy.deepcopy(adapted)
    add_lora(adapted, settings)
    loss, gradients = naive_step(adapted)
    if model_type != "deepseek_v4":  # of which some layers only choose what is attended to
        assert all(gradients[name].any() for name, weight in adapted.named_parameters() if weight.requires_grad)
    _, given_loss, given = first_step(plain, module={"lora": settings})
    assert given_loss == pytest.approx(loss, rel=2e-5)
    assert difference(given, gradients) < 2e-5


def test_layers_that_are_not_called_as_linear_ones_have_no_adapter_by_default():
    assert not_adapted(tiny_architecture("llama")) is None
    assert not_adapted(tiny_architecture("falcon")) is None  # its layers do in their own way what a linear one does
    assert not_adapted(tiny_architecture("llama4_text"))[0] == "model.layers.0.feed_forward.router"
    mixer = "backbone.layers.0.mixer"
    assert not_adapted(tiny_architecture("mamba"))[:3] == [f"{mixer}.{n}_proj" for n in ("x", "dt", "out")]
