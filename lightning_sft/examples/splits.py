"""Rows drawn at random, on the one side or the other of a division that no seed changes."""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from datasets import Dataset

from lightning_sft.checks import check_choice, check_integer

Split = Literal["train", "validation"]
_T = TypeVar("_T")


class Draws:
    """Draws what `random.Random` would, of the same seed, in a third of its time: without checks of arguments."""

    def __init__(self, seed: int) -> None:
        self._random_bits = random.Random(seed).getrandbits

    def below(self, end: int) -> int:
        """Like `randrange(end)`: numbers of as many bits as `end` has, until one is smaller."""
        num_bits = end.bit_length()
        drawn = self._random_bits(num_bits)
        while drawn >= end:
            drawn = self._random_bits(num_bits)
        return drawn

    def between(self, first: int, last: int) -> int:
        """Like `randint(first, last)`."""
        return first + self.below(last - first + 1)

    def choice(self, values: Sequence[_T]) -> _T:
        """Like `choice(values)`."""
        return values[self.below(len(values))]

    def pair(self, values: Sequence[_T]) -> tuple[_T, _T]:
        """Like `sample(values, 2)` of at most 21 values: the last one takes the place of the first that is drawn."""
        first, second = self.below(len(values)), self.below(len(values) - 1)
        return values[first], values[-1 if second == first else second]


def draw_rows(draw: Callable[[Draws], dict[str, str] | None], num_rows: int, seed: int, split: str) -> Dataset:
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
    draws = Draws(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        row = draw(draws)
        if row is not None and (zlib.crc32(row["solution"].encode()) % 10 == 0) == (split == "validation"):
            rows.append(row)
    return Dataset.from_dict({column: [row[column] for row in rows] for column in ("prompt", "output", "ground_truth")})
