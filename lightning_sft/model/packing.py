"""Whether a model can take packed batches. It is tried against the plain model, whatever attends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_sft.model.attention import VARLEN
from lightning_sft.model.probing import CALL_ERRORS, Probe, relative_difference

_LENGTHS = (9, 21)  # tokens of the documents that are tried; the second is longer than most windows of tiny models
_WATCHED = "lightning_sft_watched"


def enable_packing(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str | None:
    """Let the model take packed batches, if it can; nothing else about it changes. Returns None, or why it cannot.

    Models with `sdpa` attention get `VARLEN`; flash attention takes packed batches by itself. Then logits of packed
    documents are compared with those of each document alone in the plain model: convolutions and recurrent states mix
    documents without any attention, and positions may be counted in another way than packed batches tell. Documents
    that are tried are short, so windows of attention are looked at where they are handed over. Matrices are multiplied
    in `dtype`, by default that of the weights: kernels for half precision do not take every shape on every device.
    """
    attention = model.config._attn_implementation
    why_not = why_never_packed(model)
    if why_not or attention == VARLEN:
        return why_not
    if next(model.parameters()).is_meta:
        return f"{_name(model)} has no weights yet" if attention == "sdpa" else None
    try:
        why_not = _tried_out(model, attention, Probe(model, dtype))
    except CALL_ERRORS as error:
        why_not = f"does not run on packed documents: {error}"
    if why_not is None:
        return None
    if not _is_flash(attention):
        model.set_attn_implementation(attention)
    return f"{_name(model)} {why_not}"


def why_never_packed(model: PreTrainedModel) -> str | None:
    """Why the model cannot take packed batches, as far as can be told without running it; None if it perhaps can."""
    attention = model.config._attn_implementation or ""
    if attention == VARLEN or _is_flash(attention):
        return None
    if attention != "sdpa":
        return f"{_name(model)} uses `{attention}` attention"
    if not model._supports_flash_attn or not model._can_set_attn_implementation():
        return f"{_name(model)} does not use plain causal attention"
    return None


def _is_flash(attention: str) -> bool:
    return attention.startswith("flash_attention")


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__.removeprefix("FSDP")


def _tried_out(model: PreTrainedModel, attention: str, probe: Probe) -> str | None:
    """Why packed documents are not read as each alone; the model is left with the attention for packed documents."""
    short, long = (probe.document(length, seed) for seed, length in enumerate(_LENGTHS))
    plain = [probe.logits(document.unsqueeze(0))[0] for document in (short, long)]
    if not _is_flash(attention):  # to which windows are handed over in any case, packed or not
        if why_not := _window_in_mask(model, probe, long):
            return why_not
        model.set_attn_implementation(VARLEN)
    packed = probe.packed_logits(short, long)
    behind_another = probe.packed_logits(probe.document(len(short), seed=2), long)[1]
    same_kernel, other_kernel = (2e-2, 1e-1) if probe.half else (1e-4, 1e-3)
    if relative_difference(packed[1], behind_another) > same_kernel:
        return "lets packed documents see each other"
    if any(relative_difference(*each) > other_kernel for each in zip(packed, plain, strict=True)):
        return "processes packed documents differently from separate ones"
    return None


# -- windows ---------------------------------------------------------------------------------------------------------


def _window_in_mask(model: PreTrainedModel, probe: Probe, document: Tensor) -> str | None:
    """Whether a layer's mask has a window, or anything else, that its call does not tell: packed rows have no mask."""
    attention = model.config._attn_implementation
    _watch.start()
    model.set_attn_implementation(_WATCHED)
    try:
        probe.logits(document.unsqueeze(0))
    finally:
        model.set_attn_implementation(attention)
        _watch.masks.clear()
    return _watch.why_not


class _Watch:
    """What `transformers` builds masks of, and what layers are called with."""

    def __init__(self) -> None:
        self.masks: list[tuple[Tensor, int | None, bool]] = []
        self.why_not: str | None = None

    def start(self) -> None:
        self.masks, self.why_not = [], None

    def build_mask(self, *args: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any) -> Tensor:
        build: Callable[..., Any] = sdpa_mask
        options = kwargs | {"local_size": local_size, "use_vmap": use_vmap, "allow_is_causal_skip": False}
        mask: Tensor = build(*args, **options)
        self.masks.append((mask, local_size, use_vmap))
        return mask

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        found = next(((window, custom) for each, window, custom in self.masks if each is attention_mask), None)
        told = kwargs.get("sliding_window")
        if found is not None and found[1]:
            self.why_not = "builds its own attention masks"
        elif found is not None and found[0] != told:
            window = told if found[0] is None else found[0]
            self.why_not = f"has a window of {window} tokens that only its mask applies"
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


_watch = _Watch()
AttentionInterface.register(_WATCHED, _watch.attend)
AttentionMaskInterface.register(_WATCHED, _watch.build_mask)
