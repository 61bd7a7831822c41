"""Small runs whose every step can be compared; in this process, or in others."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_sft import GenerationMonitor, LastCheckpoint, Sampling, SFTDataModule, SFTModule
from lightning_sft.training.checkpoint_weights import InitialWeights
from support.models import character_tokenizer, tiny_config

WORDS = ["tree", "a", "stone river", "of", "light and day", "to", "grass", "sun moon star", "w", "seas"]
ROWS = [{"prompt": f"{i}:" + "p" * (i % 4), "output": WORDS[i % 10] * (1 + i % 3)} for i in range(43)]
NUM_STEPS = 12  # two epochs in steps of 8 rows, the sixth step of each of 3 rows

SHARDED = {
    "fsdp": ModelParallelStrategy,
    "fsdp, one file": partial(ModelParallelStrategy, save_distributed_checkpoint=False),
}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class StepLog(L.Callback):
    """A line for each optimizer step: numbers to the last digit, and which rows this process had.

    In files of their own, a line for each validation, and for each epoch's beginning and end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": trainer.global_step, "rows": sorted(batch.locations), **metrics}) + "\n")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        # Means over correct responses alone stay as they were where this validation has none.
        shown = (name for name in trainer.callback_metrics if name.startswith("val/") and not name.endswith("correct"))
        self._note("validations", trainer, {name: trainer.callback_metrics[name].item() for name in shown})

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._note("epoch_starts", trainer, {"epoch": trainer.current_epoch})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._note("epoch_ends", trainer, {"epoch": trainer.current_epoch})

    def _note(self, kind: str, trainer: Any, values: dict[str, float]) -> None:
        with open(self.path.with_name(self.path.name.replace("steps", kind)), "a") as file:
            file.write(json.dumps({"step": trainer.global_step, **values}) + "\n")


class StopAt(L.Callback):
    """Ends a run after a step, as if somebody had stopped it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop |= trainer.global_step >= self.step


class FirstGradients(L.Callback):
    gradients: dict[str, Tensor] | None = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.gradients is None:
            named = pl_module.model.named_parameters()
            self.gradients = {name: whole(weight.grad) for name, weight in named if weight.requires_grad}


def read_log(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a process may be killed while it writes one."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def longer_length(response: str, ground_truth: str) -> dict[str, float]:
    return dict.fromkeys(("format_reward", "answer_reward", "reward"), float(len(response) > 2))


def train(
    folder: Path,
    *,
    data: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    dtype: str = "float32",
    strategy: str = "auto",
    every_n_steps: int | None = None,
    requeue: bool = False,
    generate: bool = False,
    callbacks: list[L.Callback] | None = None,
    init_from: Path | None = None,
    **trainer_options: Any,
) -> dict[str, Any]:
    """One run of AdamW with a schedule and clipping; continues from the folder's last checkpoint if there is one.

    A new one can begin with the weights of another's checkpoint.
    """
    torch.set_num_threads(1)
    log, first = StepLog(folder / f"steps_{os.environ.get('RANK', 0)}.jsonl"), FirstGradients()
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"optimizer": adamw, "warmup_steps": 2, "model_kwargs": {"dtype": getattr(torch, dtype)}}
    sft = SFTModule(**({"model": tiny_config(**(config or {}))} | options | (module or {})))
    sft.initial_weights = None if init_from is None else InitialWeights(init_from)
    sampling = Sampling(max_new_tokens=4, temperature=1.0)
    monitor = [GenerationMonitor(longer_length, num_prompts=3, every_n_steps=5, sampling=sampling)] if generate else []
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": int(os.environ.get("WORLD_SIZE", 1)),
            "strategy": SHARDED[strategy]() if strategy in SHARDED else strategy,
            "max_steps": NUM_STEPS,
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": [log, first, *monitor, LastCheckpoint(every_n_steps, requeue), *(callbacks or ())],
        }
        | trainer_options
    )
    how = {"tokenizer": character_tokenizer(), "train_data": ROWS, "batch_size": 8} | (data or {})
    rows = SFTDataModule(**how)
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(sft, rows, ckpt_path=last if last.exists() else None)
    result = {
        "losses": [line["train/loss"] for line in read_log(log.path)],
        "gradients": first.gradients,
        "weights": {name: whole(weight) for name, weight in sft.model.named_parameters()},
    }
    if trainer.is_global_zero:
        torch.save(result, folder / "result.pt")
    return result


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
