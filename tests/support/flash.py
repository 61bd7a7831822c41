"""Stands in for the kernels of flash attention, which need a GPU: naive, but called as they are."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

NAIVE_FLASH = "flash_attention_naive"


def naive_flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each document of `cu_seq_lens_q`, or within each row; with a window if one is told."""
    assert attention_mask is None  # rows are padded on the right, or not at all
    lengths = [query.shape[2]] if kwargs.get("cu_seq_lens_q") is None else kwargs["cu_seq_lens_q"].diff().tolist()
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    outputs = []
    for q, k, v in zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True):
        ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        mask = ones.tril() & ones.triu(1 - (kwargs.get("sliding_window") or len(ones)))
        scores = q @ k.transpose(-1, -2) * (kwargs.get("scaling") or q.shape[-1] ** -0.5)
        outputs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAIVE_FLASH, naive_flash_attention)
AttentionMaskInterface.register(NAIVE_FLASH, flash_attention_mask)


def attend_by_naive_flash(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which attends as with `attn_implementation="flash_attention_2"`."""
    with patch("transformers.modeling_utils.lazy_import_flash_attention"):  # there is no package to load
        model.set_attn_implementation(NAIVE_FLASH)
    return model
