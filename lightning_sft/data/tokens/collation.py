"""Examples side by side in one microbatch: padded or packed, shifted by one, the response marked."""

from collections.abc import Sequence

import torch

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
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    response = torch.zeros((len(rows), width - 1), dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row.input_ids)] = torch.as_tensor(row.input_ids, dtype=torch.int64)
        for start, end in row.response_labels():
            response[number, start:end] = True
    # Cloned, or writing to `labels` would change `input_ids`.
    locations = [example.location for example in examples]
    lengths = [max(0, len(row.input_ids) - 1) for row in examples]
    return Microbatch.of(tokens[:, :-1].clone(), tokens[:, 1:].clone(), response, locations, lengths)


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
    tokens = [torch.as_tensor(row.input_ids, dtype=torch.int64) for row in rows]
    lengths = torch.tensor([len(row) - 1 for row in tokens])
    positions = [torch.arange(length) for length in lengths.tolist()]
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    response = torch.zeros((1, int(bounds[-1])), dtype=torch.bool)
    for row, offset in zip(rows, bounds.tolist(), strict=False):
        for start, end in row.response_labels():
            response[0, offset + start : offset + end] = True
    return Microbatch.of(
        input_ids=torch.cat([row[:-1] for row in tokens]).unsqueeze(0),
        labels=torch.cat([row[1:] for row in tokens]).unsqueeze(0),
        response_mask=response,
        locations=[example.location for example in examples],
        lengths=lengths.tolist() if examples else [],
        packing=Packing(torch.cat(positions).unsqueeze(0), bounds, int(lengths.max())),
    )


def _nothing(pad_id: int) -> Example:
    """One masked token: a device without any sequence runs the model as often as the others, which wait for it."""
    return Example(input_ids=[pad_id] * 2, num_prompt_tokens=2)
