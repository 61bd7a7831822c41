"""Supervised fine-tuning of causal language models with PyTorch Lightning."""

from importlib.metadata import version

from lightning_sft.batch_sizes import find_batch_size
from lightning_sft.callbacks import (
    GenerationMonitor,
    HuggingFaceExport,
    LastCheckpoint,
    StepProgressBar,
    TokenThroughput,
)
from lightning_sft.datamodule import SFTDataModule
from lightning_sft.export import export_model
from lightning_sft.generation import log_generations
from lightning_sft.learning_rates import find_lr
from lightning_sft.log_probs import compute_entropy, get_response_log_probs
from lightning_sft.losses import masked_normalize, sft_loss, sft_microbatch_train_step
from lightning_sft.module import SFTModule
from lightning_sft.records import GenerationRecord
from lightning_sft.rewards import boxed_answer_reward, exact_match_reward, numeric_match_reward, r1_zero_reward
from lightning_sft.sampling import Sampling
from lightning_sft.tokenization import tokenize_prompt_and_output

__version__ = version("lightning-sft")

__all__ = [
    "GenerationMonitor",
    "GenerationRecord",
    "HuggingFaceExport",
    "LastCheckpoint",
    "SFTDataModule",
    "SFTModule",
    "Sampling",
    "StepProgressBar",
    "TokenThroughput",
    "boxed_answer_reward",
    "compute_entropy",
    "exact_match_reward",
    "export_model",
    "find_batch_size",
    "find_lr",
    "get_response_log_probs",
    "log_generations",
    "masked_normalize",
    "numeric_match_reward",
    "r1_zero_reward",
    "sft_loss",
    "sft_microbatch_train_step",
    "tokenize_prompt_and_output",
]
