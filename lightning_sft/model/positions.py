"""How long a row may be for a model."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lightning_sft.model.probing import CALL_ERRORS, Probe

_GOES_BEYOND = ("linear", "dynamic", "yarn")  # kinds of rotary positions that are made for longer rows
_LENGTH = 5


def num_positions(model: PreTrainedModel) -> int | None:
    """The most inputs that a row may have; None if there is no limit.

    Learned and tabulated positions end with their table: a few tokens are read to see which rows of it are looked up,
    since some models count from 2. Rotary positions end where the model was trained to (`max_position_embeddings`),
    unless they are scaled by a rule that goes beyond. Models without positions (ALiBi, state spaces) have no limit.
    """
    config, kinds = model.config.get_text_config(decoder=True), list(_rotary_kinds(model))
    tables = [*_looked_up(model), *_tabulated(model)]
    if not kinds:  # Whisper's table is sliced, and that of MPT is made anew in each call
        configured = (getattr(config, name, None) for name in ("max_target_positions", "max_seq_len"))
        tables += [size for size in configured if size]
    if tables:
        return min(tables)
    limit = getattr(config, "max_position_embeddings", None)
    unlimited = getattr(config, "alibi", False) or any(kind.startswith(_GOES_BEYOND) for kind in kinds)
    ends = bool(kinds) and not unlimited  # Falcon has a module for rotary angles even where it does without
    return limit if isinstance(limit, int) and limit > 0 and ends else None


class _Lookups(TorchFunctionMode):
    """Finds the embeddings that are looked up at positions, one after another."""

    def __init__(self) -> None:
        self.limits: list[int] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.embedding and len(args) > 1:
            indices, table = args[0], args[1]
            steps = indices.reshape(-1)[-_LENGTH:].diff()
            if len(steps) == _LENGTH - 1 and bool((steps == 1).all()):
                self.limits.append(table.shape[0] - (int(indices.max()) - (_LENGTH - 1)))
        return func(*args, **(kwargs or {}))


def _looked_up(model: PreTrainedModel) -> list[int]:
    if next(model.parameters()).is_meta:
        return []
    probe, lookups = Probe(model), _Lookups()
    document = probe.document(_LENGTH, seed=0)
    document[1] = document[0]  # token ids that count up by one would look like positions
    try:
        with lookups:
            probe.logits(document.unsqueeze(0))
    except CALL_ERRORS:
        return []
    return lookups.limits


def _tabulated(model: PreTrainedModel) -> Iterator[int]:
    """Rows of tables that are no embeddings: sines and cosines of CTRL, GPT-J and CodeGen."""
    for module in model.modules():
        tensors = dict(module.named_buffers(recurse=False)) | vars(module)
        for name, table in tensors.items():
            is_table = isinstance(table, Tensor) and table.ndim == 2 and table.is_floating_point()
            if is_table and re.fullmatch("embed_positions|pos_encoding", name):
                yield len(table)


def _rotary_kinds(model: nn.Module) -> Iterator[str]:
    """Of each module that makes rotary angles: `default`, `yarn`, and so on."""
    for module in model.modules():
        if "Rotary" in type(module).__name__:
            kind: Any = getattr(module, "rope_type", "default")
            yield from kind.values() if isinstance(kind, dict) else [kind or "default"]
