"""Rows drawn at random, on the one side or the other of a division that no seed changes."""

import random
import zlib
from collections.abc import Callable
from typing import Literal, get_args

from datasets import Dataset

from lightning_sft.errors import SettingsError

Split = Literal["train", "validation"]


def draw_rows(draw: Callable[[random.Random], dict[str, str] | None], num_rows: int, seed: int, split: str) -> Dataset:
    """Draw rows of one split until there are enough of them.

    Args:
        draw: Makes one row of `prompt`, `output`, `ground_truth` and `solution`, or None where the draw gave no valid
            one. A checksum of the solution alone decides to which split a row belongs: one in ten is for validation.
        num_rows: Rows to return.
        seed: The same seed gives the same rows on every machine.
        split: "train" or "validation".

    Returns:
        The columns `prompt`, `output` and `ground_truth`.

    Raises:
        SettingsError: If `split` has another value.
    """
    if split not in get_args(Split):
        raise SettingsError(f'`split` is {split!r}; expected "train" or "validation".')
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        row = draw(rng)
        if row is not None and (zlib.crc32(row["solution"].encode()) % 10 == 0) == (split == "validation"):
            rows.append(row)
    return Dataset.from_dict({column: [row[column] for row in rows] for column in ("prompt", "output", "ground_truth")})
