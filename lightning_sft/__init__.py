"""Supervised fine-tuning of causal language models with PyTorch Lightning.

Names are imported when they are first used, so that a helper brings torch and `transformers`, but not Lightning.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `as`: these are public
    from lightning_sft.callbacks import GenerationMonitor as GenerationMonitor
    from lightning_sft.callbacks import HuggingFaceExport as HuggingFaceExport
    from lightning_sft.callbacks import LastCheckpoint as LastCheckpoint
    from lightning_sft.callbacks import StepProgressBar as StepProgressBar
    from lightning_sft.callbacks import TokenThroughput as TokenThroughput
    from lightning_sft.data.datamodule import SFTDataModule as SFTDataModule
    from lightning_sft.data.rows.transforms import alpaca_row as alpaca_row
    from lightning_sft.data.rows.transforms import chosen_row as chosen_row
    from lightning_sft.data.rows.transforms import is_rewarded as is_rewarded
    from lightning_sft.data.rows.transforms import query_row as query_row
    from lightning_sft.data.tokens.tokenization import tokenize_prompt_and_output as tokenize_prompt_and_output
    from lightning_sft.errors import SettingsError as SettingsError
    from lightning_sft.export.huggingface import export_model as export_model
    from lightning_sft.generation.best_responses import best_responses as best_responses
    from lightning_sft.generation.generate import log_generations as log_generations
    from lightning_sft.generation.records import GenerationRecord as GenerationRecord
    from lightning_sft.generation.responses import Response as Response
    from lightning_sft.generation.responses import ResponseRequest as ResponseRequest
    from lightning_sft.generation.sampling import Sampling as Sampling
    from lightning_sft.inspection.inspect_rows import inspect_rows as inspect_rows
    from lightning_sft.model.log_probs import compute_entropy as compute_entropy
    from lightning_sft.model.log_probs import get_response_log_probs as get_response_log_probs
    from lightning_sft.planning.batch_sizes import find_batch_size as find_batch_size
    from lightning_sft.planning.learning_rates import find_lr as find_lr
    from lightning_sft.results.comparison import compare_runs as compare_runs
    from lightning_sft.results.finished_run import read_run as read_run
    from lightning_sft.rewards.functions import boxed_answer_reward as boxed_answer_reward
    from lightning_sft.rewards.functions import exact_match_reward as exact_match_reward
    from lightning_sft.rewards.functions import numeric_match_reward as numeric_match_reward
    from lightning_sft.rewards.functions import r1_zero_reward as r1_zero_reward
    from lightning_sft.training.losses import masked_normalize as masked_normalize
    from lightning_sft.training.losses import sft_loss as sft_loss
    from lightning_sft.training.losses import sft_microbatch_train_step as sft_microbatch_train_step
    from lightning_sft.training.module import SFTModule as SFTModule

    __version__: str

_MODULES = {
    "callbacks": ("GenerationMonitor", "HuggingFaceExport", "LastCheckpoint", "StepProgressBar", "TokenThroughput"),
    "data.datamodule": ("SFTDataModule",),
    "data.rows.transforms": ("alpaca_row", "chosen_row", "is_rewarded", "query_row"),
    "data.tokens.tokenization": ("tokenize_prompt_and_output",),
    "errors": ("SettingsError",),
    "export.huggingface": ("export_model",),
    "generation.best_responses": ("best_responses",),
    "generation.generate": ("log_generations",),
    "generation.records": ("GenerationRecord",),
    "generation.responses": ("Response", "ResponseRequest"),
    "generation.sampling": ("Sampling",),
    "inspection.inspect_rows": ("inspect_rows",),
    "model.log_probs": ("compute_entropy", "get_response_log_probs"),
    "planning.batch_sizes": ("find_batch_size",),
    "planning.learning_rates": ("find_lr",),
    "results.comparison": ("compare_runs",),
    "results.finished_run": ("read_run",),
    "rewards.functions": ("boxed_answer_reward", "exact_match_reward", "numeric_match_reward", "r1_zero_reward"),
    "training.losses": ("masked_normalize", "sft_loss", "sft_microbatch_train_step"),
    "training.module": ("SFTModule",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("lightning-sft")
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"lightning_sft.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'lightning_sft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
