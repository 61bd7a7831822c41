"""Tiny models of every architecture that `transformers` has, built from their default configurations made small."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# What a size is called differs; of these names each configuration gets those that it knows.
_SIZES: dict[Any, str] = {
    136: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    32: "hidden_size hidden_size_global d_model n_embd emb_dim dim embedding_size word_embed_proj_dim lru_width "
    "attention_hidden_size adapter_in_dim adapter_input_size adapter_out_dim",
    48: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size dff feed_forward_size "
    "dim_ff mlp_hidden_size",
    24: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_size "
    "expert_ffn_hidden_size intermediate_size_mlp",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers depth num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
    "top_k_experts "
    "num_global_key_value_heads conv_kernel",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_decoder_attention_heads num_encoder_attention_heads num_local_experts n_routed_experts num_routed_experts "
    "moe_num_experts linear_num_key_heads linear_num_heads linear_num_value_heads zero_expert_num ",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels linear_key_head_dim linear_value_head_dim "
    "linear_head_dim global_head_dim hidden_size_per_layer_input mamba_d_head mamba_head_dim mamba_d_state "
    "ssm_state_size state_size "
    "rotary_dim index_head_dim d_kv sliding_window window_size local_attention attention_chunk_size "
    "attention_window_size local_window_size sliding_window_size",
    16: "mamba_chunk_size chunk_size q_lora_rank kv_lora_rank qk_head_dim laurel_rank index_topk time_step_rank",
    1: "max_window_layers n_group topk_group n_shared_experts first_k_dense_replace num_shared_experts mamba_n_groups "
    "n_groups pad_token_id num_dense_layers mlp_only_layers_count",
    96: "max_position_embeddings n_positions max_seq_len max_target_positions max_source_positions n_ctx "
    "original_max_position_embeddings",
    0.0: "dropout attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob activation_dropout "
    "resid_pdrop embd_pdrop attn_pdrop layerdrop decoder_layerdrop encoder_layerdrop resid_dropout embd_dropout "
    "residual_dropout emb_dropout expert_dropout router_jitter_noise input_jitter_noise",
    0.2: "initializer_range init_std",
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()} | {"use_sliding_window": True}

# What the configuration of a type needs beside that, mostly since one size follows from others.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "gemma3n_text": {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "intermediate_size": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "mpt": {"attn_config": {}},
    "reformer": {
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "axial_pos_embds": False,
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "layer_types": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {"attention_head_dim": 16, "attention_hidden_size": 64, "layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_settings(model_type: str) -> dict[str, Any]:
    """Settings that make a model of this type small: some tens of thousands of parameters."""
    given = CONFIG_MAPPING[model_type]()
    unset = {
        name: None for name in ("sliding_window",) if getattr(given, name, 0) is None
    }  # which `to_dict` leaves out
    settings = _made_small(given.to_dict() | unset, dict(given.attribute_map or {}))
    if getattr(given, "is_decoder", None) is False and not getattr(given, "is_encoder_decoder", False):
        settings["is_decoder"] = True  # an encoder such as BERT is a causal language model only with that
    return settings | _EXCEPTIONS.get(model_type, {})


def _made_small(known: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    names = set(known) | {name for name, target in aliases.items() if target not in _BY_NAME}
    settings = {name: _BY_NAME[name] for name in names if name in _BY_NAME and _is_size(known.get(name, 1), name)}
    if known.get("kv_lora_rank"):  # keys and values are made for each head
        settings["num_key_value_heads"] = settings.get("num_attention_heads", 4)
    for name, value in known.items():
        if isinstance(value, dict) and name.endswith("_config") and value:
            kept = {key: value[key] for key in ("model_type",) if key in value}
            settings[name] = kept | _made_small(value, {})
    return settings


def _is_size(value: Any, name: str) -> bool:
    if value is None or isinstance(value, bool):
        return name in ("sliding_window", "use_sliding_window", "num_key_value_heads")
    return isinstance(value, int | float)


def tiny_architecture(model_type: str, **changes: Any) -> PreTrainedModel:
    """A model of this type with random weights, none of which is zero or one."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"`transformers` {transformers.__version__} has no {model_type}")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(tiny_settings(model_type) | changes))
    )
    stir(model)
    return model


def stir(model: nn.Module) -> None:
    """Add noise to all weights: many are initialised to 0 or 1, and a layer that does nothing would hide its errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point():
                weight += 0.05 * torch.randn(weight.shape, generator=generator).to(weight)
