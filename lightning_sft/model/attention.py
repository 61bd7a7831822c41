"""Attention of packed batches: documents one after another in a single row, each attending to itself alone.

Registered with `transformers` under the name in `VARLEN`. A batch is packed if the model is called with
`cu_seq_lens_q`, as for flash attention; any other call is `sdpa`, to the letter, masks included.
"""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_sft.errors import SettingsError

_HAS_KERNEL = False
if torch.backends.cuda.is_built():  # other builds would import it for nothing
    with suppress(ImportError):  # not in every build of torch
        from torch.nn.attention.varlen import varlen_attn

        _HAS_KERNEL = True
# Newer versions of torch than 2.11 have to be told that there may be fewer heads of keys than of queries.
_GROUPED: dict[str, Any] = {}
if _HAS_KERNEL and "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _GROUPED["enable_gqa"] = True

VARLEN = "lightning_sft_varlen"
_LONGEST_BY_PRODUCTS = 1024  # tokens: 2 MiB of probabilities for each head


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row, with the arguments that `transformers` gives.

    Queries are `(1, num_heads, num_tokens, head_size)`, keys and values `(1, num_key_value_heads, num_tokens,
    head_size)`. A packed row has `cu_seq_lens_q`, where documents begin and end, `max_length_q`, and perhaps
    `sliding_window`, the most tokens that a token attends to, itself included.

    Returns:
        `(1, num_tokens, num_heads, head_size)`, and None for the attention weights.
    """
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise SettingsError(f"{type(module).__name__} attends with `{name}`. Set `layout: padded`.")
    window = kwargs.get("sliding_window")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as for `sdpa`: rotary embeddings have made float32 of queries and keys
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    if _HAS_KERNEL and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        longest = kwargs["max_length_q"]
        q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
        sizes = (-1 if window is None else window - 1, 0)
        attended: Any = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=sizes, **_GROUPED
        )
        return attended.unsqueeze(0), None
    return _attend_each(query, key, value, bounds, scaling, dropout, window), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of documents is data
def _attend_each(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """One document after another."""
    lengths = bounds.diff().tolist()  # waits for a CUDA device; half precision has a kernel of its own there
    half_on_cpu = query.device.type == "cpu" and query.dtype.itemsize < 4
    documents = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = []
    for length, (q, k, v) in zip(lengths, documents, strict=True):
        if half_on_cpu and length <= _LONGEST_BY_PRODUCTS:
            mask = _causal_mask(length, window, query.device)
            attended.append(_attend_by_products(q, k, v, mask, dropout, scaling))
            continue
        in_window = window is None or length <= window  # then causality is all there is to it, and no mask is built
        window_mask = None if in_window else _causal_mask(length, window, query.device)
        attended.append(
            F.scaled_dot_product_attention(
                q, k, v, window_mask, dropout, is_causal=in_window, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()  # some models take a view of it


def _causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a token attends to another, `(length, length)`."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Attention by plain matrix products, which keep the `length ** 2` probabilities of each head for backward.

    On CPU torch's kernel is no faster in half precision than in float32, and its backward pass even slower. Matrix
    products are faster in half precision.
    """
    (_, num_groups, length, size), group_size = key.shape, query.shape[1] // key.shape[1]
    scaled = query * (size**-0.5 if scaling is None else scaling)
    scores = torch.bmm(scaled.reshape(num_groups, group_size * length, size), key.squeeze(0).transpose(1, 2))
    scores = scores.view(num_groups, group_size, length, length)
    scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    attended = torch.bmm(probabilities.view(num_groups, group_size * length, length), value.squeeze(0))
    return attended.view(1, num_groups * group_size, length, -1)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, sdpa_mask)


def packed_inputs(model: PreTrainedModel, packing: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is to be called with besides `input_ids`: nothing for a padded microbatch.

    `packing` has `position_ids`, `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, or is empty if
    padded. Under `VARLEN` a mask of one element keeps `transformers` from building one of `num_tokens ** 2`.
    """
    inputs = dict(packing)
    if inputs and model.config._attn_implementation == VARLEN:
        inputs["attention_mask"] = packing["position_ids"].new_ones(1, 1, 1, 1, dtype=torch.bool)
    return inputs
