"""Rotary positions: in float32 whatever type the weights have, and of each row as if it were alone.

LongRoPE and dynamic NTK choose their frequencies by the length of a row. `transformers` takes the longest of the batch
for that, and dynamic NTK what it saw before, so that a loss would depend on how rows are put into batches.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_sft.errors import SettingsError


class RotaryInFloat32(nn.Module):
    """A module whose tensors may all be converted or moved: rotary frequencies in it are float32 afterwards, too.

    In bfloat16 they would be wrong by up to 0.5 in the cosine at position 4,000 (Lightning's `bf16-true` casts them).
    Before it has a model, nothing would be converted, which is refused.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if getattr(self, "model", None) is None and fn(torch.zeros((), dtype=torch.float32)).dtype != torch.float32:
            raise SettingsError(
                f"`{type(self).__name__}` has no model yet whose weights could be converted. Set their type by "
                "`model_kwargs`, such as {'dtype': 'bfloat16'}, or the trainer's `precision`."
            )
        exact = [
            (each, name, buffer)
            for each in self.modules()
            for name, buffer in each.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.dtype == torch.float32 and not buffer.is_meta
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for each, name, buffer in exact:
            converted = getattr(each, name)
            if converted.dtype != torch.float32:
                setattr(each, name, buffer.to(converted.device))
        return self


# -- frequencies that a row's length decides ---------------------------------------------------------------------------


def keep_rotary_by_row(model: nn.Module) -> None:
    """Give each row, and each document of a packed row, the rotary frequencies that it gets alone.

    Modules whose frequencies depend on the length are changed in place; all others stay as they are.
    """
    for module in model.modules():
        if any(map(_is_switched, _kinds(module).values())):
            module.forward = partial(_angles_by_row, module)


def positions_by_row(model: nn.Module, lengths: Sequence[int], width: int) -> Tensor | None:
    """Positions that tell a padded batch's lengths to modules that `keep_rotary_by_row` has changed.

    `transformers` builds a mask for such positions, so there are none as long as all rows get the same frequencies.

    Returns:
        `(num_rows, width)`, counted from 0 in each row and 0 on padding, in main memory; None if the model need not
        be told.
    """
    changed = [module for module in model.modules() if isinstance(vars(module).get("forward"), partial)]
    switches = [_switching_length(module, layer) for module in changed for layer in _kinds(module)]
    if not switches or max(lengths, default=0) <= min(switches) or min(lengths) == max(lengths):
        return None
    positions = torch.arange(width).expand(len(lengths), width)
    return positions * (positions < torch.tensor(lengths).unsqueeze(1))


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kind of rotary positions, such as `longrope`; by the type of layer if it differs, otherwise by None."""
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        return dict(kinds)
    return {None: kinds} if isinstance(kinds, str) else {}


def _is_switched(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _switching_length(module: Any, layer_type: str | None) -> int:
    """Rows longer than this get other frequencies."""
    if "dynamic" in _kinds(module)[layer_type]:
        return int(module.original_max_seq_len)
    settings = module.config.rope_parameters
    settings = settings if layer_type is None else settings[layer_type]
    return int(settings.get("original_max_position_embeddings", 2**31))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths of documents are data
def _angles_by_row(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None, **kwargs: Any) -> Any:
    """What the module's own `forward` returns, computed for all rows of one kind after another."""
    kwargs |= {} if layer_type is None else {"layer_type": layer_type}
    kind, forward = _kinds(module)[layer_type], partial(type(module).forward, module, x)
    if not _is_switched(kind) or position_ids.ndim != 2:
        return forward(position_ids, **kwargs)
    switch = _switching_length(module, layer_type)
    # All lengths beyond make the same choice under LongRoPE, and each its own under dynamic NTK.
    lengths = _document_lengths(position_ids).clamp(min=switch, max=switch + 1 if kind == "longrope" else None)
    angles: tuple[Tensor, ...] = ()
    for length in lengths.unique().tolist():
        _forget_longer_rows(module, layer_type)
        own = lengths == length
        found = forward(position_ids * own, **kwargs)
        found = found if isinstance(found, tuple) else (found,)
        angles = tuple(
            torch.where(own.unsqueeze(-1), new, old) for new, old in zip(found, angles or found, strict=True)
        )
    return angles if len(angles) > 1 else angles[0]


def _document_lengths(position_ids: Tensor) -> Tensor:
    """For each position how long its document is: the last position that is counted from the same 0, plus 1."""
    begins = position_ids == 0
    begins[:, 0] = True
    document = begins.cumsum(dim=1) - 1
    last = torch.zeros_like(position_ids).scatter_reduce(1, document, position_ids, "amax")
    return last.gather(1, document) + 1


def _forget_longer_rows(module: Any, layer_type: str | None) -> None:
    """Put a module of dynamic NTK back to how it was before its first row."""
    if "dynamic" not in _kinds(module)[layer_type]:
        return
    prefix = "" if layer_type is None else f"{layer_type}_"
    frequencies = getattr(module, f"{prefix}inv_freq")
    setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(frequencies.device))
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
