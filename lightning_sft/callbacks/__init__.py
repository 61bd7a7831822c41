"""Callbacks: generations, throughput, checkpoints, the exported model and the progress bar."""

from lightning_sft.callbacks.generation_monitor import GenerationMonitor
from lightning_sft.callbacks.huggingface_export import HuggingFaceExport
from lightning_sft.callbacks.last_checkpoint import LastCheckpoint
from lightning_sft.callbacks.progress_bar import StepProgressBar
from lightning_sft.callbacks.throughput import TokenThroughput

__all__ = ["GenerationMonitor", "HuggingFaceExport", "LastCheckpoint", "StepProgressBar", "TokenThroughput"]
