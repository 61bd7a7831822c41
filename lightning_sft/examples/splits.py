"""Rows drawn at random, on the one side or the other of a division that no seed changes."""

import zlib
from collections.abc import Callable
from random import Random
from typing import Literal

from datasets import Dataset

from lightning_sft.checks import check_choice, check_integer

Split = Literal["train", "validation"]


def draw_rows(draw: Callable[[Random], dict[str, str] | None], num_rows: int, seed: int, split: str) -> Dataset:
    """Draw rows of one split until there are enough of them.

    Args:
        draw: Makes one row of `prompt`, `output`, `ground_truth` and `solution`, or None where the draw gave no valid
            one. A checksum of the solution alone decides to which split a row belongs: one in ten is for validation.
        num_rows: Rows to return.
        seed: The same seed gives the same rows on every machine.
        split: "train" or "validation".

    Returns:
        The columns `prompt`, `output` and `ground_truth`.
    """
    check_integer("num_rows", num_rows, at_least=1)
    check_integer("seed", seed)
    check_choice("split", split, Split)
    random = Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        row = draw(random)
        if row is not None and (zlib.crc32(row["solution"].encode()) % 10 == 0) == (split == "validation"):
            rows.append(row)
    return Dataset.from_dict({column: [row[column] for row in rows] for column in ("prompt", "output", "ground_truth")})
