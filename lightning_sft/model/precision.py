"""Lightning's words for a precision, and the types that they stand for."""

import torch

from lightning_sft.errors import SettingsError


def compute_dtype(precision: str) -> torch.dtype:
    """What matrices are multiplied in.

    Args:
        precision: As Lightning spells it.
    """
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return next((dtype for name, dtype in kinds.items() if name in precision), torch.float32)


def precision_types(precision: str) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What weights are converted to, and what autocast multiplies in."""
    types: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
        "64-true": (torch.float64, None),
        "32-true": (None, None),
        "bf16-true": (torch.bfloat16, None),
        "16-true": (torch.float16, None),
        "bf16-mixed": (None, torch.bfloat16),
        "16-mixed": (None, torch.float16),
    }
    if precision not in types:
        raise SettingsError(f"`precision` is {precision!r}; memory is only estimated for {', '.join(types)}.")
    return types[precision]
