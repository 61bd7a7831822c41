"""Examples side by side in one microbatch: padded or packed, shifted by one, the response marked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sft.data.example import Example


def collate_padded(examples: Sequence[Example], pad_id: int = 0) -> dict[str, Tensor]:
    """Right-pad examples to the longest and shift by one.

    With `t` an example's tokens and `r` True on its response tokens: `input_ids = t[:-1]`, `labels = t[1:]`,
    `response_mask = r[1:]`, so that position `i` of the mask says whether the *label* at `i` counts.

    Args:
        examples: At least one tokenised row.
        pad_id: Fills `input_ids` and `labels` after each example's end.

    Returns:
        `input_ids`, `labels` (int64) and `response_mask` (bool), each `(batch_size, max(num_tokens) - 1)`.
    """
    width = max(1, *(len(example.input_ids) for example in examples))
    tokens = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    response = torch.zeros((len(examples), width - 1), dtype=torch.bool)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        tokens[row, :length] = torch.tensor(example.input_ids, dtype=torch.int64)
        for start, end in example.response_labels():
            response[row, start:end] = True
    # Cloned, or writing to `labels` would change `input_ids`.
    return {"input_ids": tokens[:, :-1].clone(), "labels": tokens[:, 1:].clone(), "response_mask": response}


def collate_packed(examples: Sequence[Example], pad_id: int = 0) -> dict[str, Any]:
    """Put examples one after another into a single row, each shifted by one on its own; nothing is padded.

    Args:
        examples: Tokenised rows.
        pad_id: The single token of a row without any example.

    Returns:
        `input_ids`, `labels` (int64) and `response_mask` (bool), each `(1, num_tokens)`; and what models need to keep
        the documents apart, by the names that `transformers` gives it: `position_ids`, `(1, num_tokens)`, from 0 in
        each document; `cu_seq_lens_q` and `cu_seq_lens_k`, `(num_documents + 1,)`, int32, where documents begin and
        end; `max_length_q` and `max_length_k`, the longest.
    """
    rows = [example for example in examples if len(example.input_ids) > 1]
    rows = rows or [Example(input_ids=[pad_id] * 2, num_prompt_tokens=2)]
    tokens = [torch.as_tensor(row.input_ids, dtype=torch.int64) for row in rows]
    lengths = torch.tensor([len(row) - 1 for row in tokens])
    positions = [torch.arange(length) for length in lengths.tolist()]
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    response = torch.zeros((1, int(bounds[-1])), dtype=torch.bool)
    for row, offset in zip(rows, bounds.tolist(), strict=False):
        for start, end in row.response_labels():
            response[0, offset + start : offset + end] = True
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat([row[:-1] for row in tokens]).unsqueeze(0),
        "labels": torch.cat([row[1:] for row in tokens]).unsqueeze(0),
        "response_mask": response,
        "position_ids": torch.cat(positions).unsqueeze(0),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
