"""A short run with the callbacks of a test."""

import lightning as L
import torch

from lightning_sft import LastCheckpoint, SFTDataModule, SFTModule
from support.models import character_tokenizer, tiny_config

ROWS = [{"prompt": f"q{i}", "output": "abc" * (1 + i % 3), "ground_truth": f"g{i}"} for i in range(12)]


def fit(folder, callbacks, logger=False, data=None, dropout=0.0, ckpt_path=None, **options):
    module = SFTModule(tiny_config(attention_dropout=dropout), optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    data = data or SFTDataModule(character_tokenizer(), ROWS, ROWS[:5], batch_size=4)
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "logger": logger,
            "callbacks": callbacks,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, LastCheckpoint) for callback in callbacks),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            "max_epochs": 2,
        }
        | options
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer
