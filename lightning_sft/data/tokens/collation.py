"""Examples side by side in one microbatch: padded or packed, shifted by one, the response marked."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.microbatch import Layout, Microbatch, Packing


def collate(examples: Sequence[Example], layout: Layout, pad_id: int = 0) -> Microbatch:
    """Put examples into one microbatch, by `collate_packed` or `collate_padded`."""
    return collate_packed(examples, pad_id) if layout == "packed" else collate_padded(examples, pad_id)


def collate_padded(examples: Sequence[Example], pad_id: int = 0) -> Microbatch:
    """Right-pad examples to the longest and shift by one.

    With `t` an example's tokens and `r` True on its response tokens: `input_ids = t[:-1]`, `labels = t[1:]`,
    `response_mask = r[1:]`, so that position `i` of the mask says whether the *label* at `i` counts.

    Args:
        examples: Tokenised rows.
        pad_id: Fills `input_ids` and `labels` after each example's end; the single token if there is no example.

    Returns:
        `input_ids`, `labels` (int64) and `response_mask` (bool), each `(batch_size, max(num_tokens) - 1)`.
    """
    rows = examples or [_nothing(pad_id)]
    width = max(1, *(len(row.input_ids) for row in rows))
    tokens = np.full((len(rows), width), pad_id, np.int64)
    response = torch.zeros((len(rows), width - 1), dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row.input_ids)] = row.input_ids
        for start, end in row.response_labels():
            response[number, start:end] = True
    # Copies, or writing to `labels` would change `input_ids`.
    input_ids, labels = (torch.from_numpy(part.copy()) for part in (tokens[:, :-1], tokens[:, 1:]))
    locations = [example.location for example in examples]
    lengths = [max(0, len(row.input_ids) - 1) for row in examples]
    return Microbatch(input_ids, labels, response, _positions(response), locations, lengths)


def collate_packed(examples: Sequence[Example], pad_id: int = 0) -> Microbatch:
    """Put examples one after another into a single row, each shifted by one on its own; nothing is padded.

    Args:
        examples: Tokenised rows. Those of a single token, which has no label, are left out.
        pad_id: The single token if there is no example.

    Returns:
        `input_ids`, `labels` (int64) and `response_mask` (bool), each `(1, num_tokens)`, with their `packing`.
    """
    examples = [example for example in examples if len(example.input_ids) > 1]
    rows = examples or [_nothing(pad_id)]
    tokens = np.concatenate([np.asarray(row.input_ids, np.int64) for row in rows])
    ends = np.cumsum([len(row.input_ids) for row in rows])  # in `tokens`, where no row is shifted yet
    lengths = np.diff(ends, prepend=0) - 1
    bounds = np.cumsum([0, *lengths])
    response = np.zeros(bounds[-1], np.bool_)
    for row, offset in zip(rows, bounds.tolist(), strict=False):
        for start, end in row.response_labels():
            response[offset + start : offset + end] = True
    position_ids = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    response_mask = _row(response)
    return Microbatch(
        input_ids=_row(np.delete(tokens, ends - 1)),
        labels=_row(np.delete(tokens, ends - 1 - lengths)),
        response_mask=response_mask,
        response_positions=_positions(response_mask),
        locations=[example.location for example in examples],
        lengths=lengths.tolist() if examples else [],
        packing=Packing(_row(position_ids), torch.from_numpy(bounds.astype(np.int32)), int(lengths.max())),
    )


def _row(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).unsqueeze(0)


def _positions(response_mask: Tensor) -> Tensor:
    """Where it is True, found here in main memory: a device would have to be waited for."""
    return response_mask.flatten().nonzero().squeeze(-1)


def _nothing(pad_id: int) -> Example:
    """One masked token: a device without any sequence runs the model as often as the others, which wait for it."""
    return Example(input_ids=[pad_id] * 2, num_prompt_tokens=2)
