"""A short run with the callbacks of a test."""

import torch

from lightning_sft import LastCheckpoint, SFTDataModule, SFTModule
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_config

ROWS = [{"prompt": f"q{i}", "output": "abc" * (1 + i % 3), "ground_truth": f"g{i}"} for i in range(12)]


def fit(folder, callbacks, logger=False, data=None, dropout=0.0, ckpt_path=None, **options):
    module = SFTModule(tiny_config(attention_dropout=dropout), optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    data = data or SFTDataModule(character_tokenizer(), ROWS, ROWS[:5], batch_size=4)
    options = {
        "enable_checkpointing": any(isinstance(callback, LastCheckpoint) for callback in callbacks),
        "log_every_n_steps": 1,
        "max_epochs": 2,
    } | options
    trainer = make_trainer(folder, logger=logger, callbacks=callbacks, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer
