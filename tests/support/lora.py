"""Small models of several architectures, and adapters that do something."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.models import tiny_config

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
