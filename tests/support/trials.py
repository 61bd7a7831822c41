"""Small modules, data and trainers for what is found by trial runs."""

from typing import Any

from lightning_sft import SFTDataModule, SFTModule
from support.models import character_tokenizer, tiny_config
from support.runs import ROWS, adamw

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}


def module(**options: Any) -> SFTModule:
    return SFTModule(tiny_config(attention_dropout=0.1), **({"optimizer": adamw, "warmup_steps": 2} | options))


def rows(**options: Any) -> SFTDataModule:
    return SFTDataModule(character_tokenizer(), ROWS, val_data=ROWS[:5], **({"batch_size": 8} | options))
