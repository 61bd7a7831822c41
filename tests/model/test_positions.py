"""How long rows may be, against the length at which the model itself gives up."""

import pytest
import torch
from support.architectures import tiny_architecture

from lightning_sft.model.positions import num_positions

pytestmark = pytest.mark.filterwarnings("ignore")  # of architectures that miss their kernels

TABLES = ["gpt2", "roberta", "opt", "bart", "biogpt", "ctrl", "gptj", "codegen", "marian", "whisper", "git", "mpt"]


@pytest.mark.parametrize("model_type", TABLES)
def test_a_table_of_positions_ends_where_the_model_fails(model_type):
    model = tiny_architecture(model_type).eval()
    limit = num_positions(model)
    input_ids = 10 + torch.arange(limit + 1)[None] % 100
    with torch.no_grad():
        assert model(input_ids[:, :-1], use_cache=False).logits.shape[1] == limit
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids, use_cache=False)


def scaled(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    return {"rope_parameters": rope | ({"original_max_position_embeddings": 32} if kind == "yarn" else {})}


BEYOND = {
    "ALiBi": ("bloom", {}),
    "ALiBi beside a rotary module": ("falcon", {"alibi": True}),
    "state space": ("mamba", {}),
    "no positions": ("jamba", {}),
    "relative positions, -1 in the configuration": ("xlnet", {}),
    "sines that grow": ("xglm", {}),
    "yarn": ("llama", scaled("yarn")),
    "linear": ("llama", scaled("linear")),
    "dynamic": ("llama", scaled("dynamic")),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_goes_beyond_has_no_limit(name):
    model_type, settings = BEYOND[name]
    model = tiny_architecture(model_type, **settings).eval()
    assert num_positions(model) is None
    with torch.no_grad():
        assert model(10 + torch.arange(200)[None] % 100, use_cache=False).logits.shape[1] == 200


def test_plain_rotary_positions_end_where_the_configuration_says():
    assert num_positions(tiny_architecture("llama", max_position_embeddings=77)) == 77
