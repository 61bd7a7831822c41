"""The size of quantised weights found out without them, against that of weights that bitsandbytes has quantised."""

import pytest
import torch
from support.models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lightning_sft.model.pretrained import build_empty_model
from lightning_sft.planning.quantized_weights import saved_by_quantization

IN_4_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    "settings",
    [
        IN_4_BITS,
        IN_4_BITS | {"bnb_4bit_use_double_quant": True},
        IN_4_BITS | {"llm_int8_skip_modules": ["down_proj", "lm_head"]},
        {"load_in_8bit": True},
    ],
)
def test_sizes_are_those_of_quantised_weights_and_their_factors(tmp_path, settings):
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model(**tiny_config(hidden_size=128, intermediate_size=520))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", quantization_config=BitsAndBytesConfig(**settings)
    )
    held = list(made.parameters())
    for weight in made.parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            held += [state.absmax, *([state.state2.absmax] if state.nested else [])]
        elif (factors := getattr(weight, "SCB", None)) is not None:
            held.append(factors)
    full = sum(weight.nbytes for weight in model.parameters())
    saved = saved_by_quantization(build_empty_model(str(tmp_path), {"dtype": "auto"}), settings)
    assert full - saved == sum(tensor.nbytes for tensor in held)
