"""What Lightning's words for a precision mean."""

from dataclasses import dataclass

import torch

from lightning_sft.errors import SettingsError

_MEANINGS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "64-true": (torch.float64, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
    "transformer-engine": (torch.bfloat16, None),
    "transformer-engine-float16": (torch.float16, None),
}
_ALIASES = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Precision:
    """What a trainer's `precision` means for weights and for products of matrices.

    Attributes:
        word: As Lightning spells it in full, such as `bf16-mixed`.
        stored: The type that all weights are converted to; None: they stay in the type that they are loaded in.
        autocast: The type that autocast multiplies matrices in; None: there is no autocast.
    """

    word: str = "32-true"
    stored: torch.dtype | None = None
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, word: object) -> "Precision":
        """The meaning of a word that Lightning's trainer takes, such as `bf16-mixed`, `16`, or None for the default."""
        name = _ALIASES.get(str(word), str(word))
        if name not in _MEANINGS:
            raise SettingsError(f"`precision` is {word!r}, expected one of {', '.join(_MEANINGS)}.")
        return cls(name, *_MEANINGS[name])

    @property
    def compute_dtype(self) -> torch.dtype:
        """What matrices are multiplied in."""
        return self.autocast or self.stored or torch.float32

    @property
    def is_half(self) -> bool:
        """Whether matrices are multiplied in 16 bits."""
        return self.compute_dtype.itemsize == 2

    def __str__(self) -> str:
        return self.word


FLOAT32 = Precision()
