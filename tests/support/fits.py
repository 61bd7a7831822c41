"""Runs of a tiny model, and what happened at each of their optimizer steps."""

import lightning as L
import torch

from lightning_sft import SFTDataModule, SFTModule
from support.models import character_tokenizer, tiny_config
from support.runs import WORDS

ROWS = [{"prompt": f"{i}:" + "p" * (i % 4), "output": WORDS[i % 10] * (1 + i % 3)} for i in range(22)]


def sgd(params):
    return torch.optim.SGD(params, lr=0.3)


def make_data(**changes):
    return SFTDataModule(**({"tokenizer": character_tokenizer(), "train_data": ROWS, "batch_size": 8} | changes))


def make_trainer(folder, **changes):
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(**(options | changes))


def sequences(microbatch):
    """The rows of a padded microbatch, or the documents of a packed one."""
    if microbatch.packing is None:
        return list(microbatch.input_ids)
    return microbatch.input_ids[0].split(microbatch.packing.cu_seq_lens.diff().tolist())


class Recorder(L.Callback):
    """What happened at each optimizer step."""

    def __init__(self):
        self.losses, self.validated, self.rows, self.layouts = [], [], [], set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.layouts |= {"packed" if microbatch.packing else "padded" for microbatch in batch.microbatches}
        ids = [row.tolist() for microbatch in batch.microbatches for row in sequences(microbatch)]
        self.rows.append(sorted(tuple(token for token in row if token != 128) for row in ids))

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)


def fit(folder, module=None, data=None, callbacks=(), ckpt_path=None, **trainer_options):
    module = module or SFTModule(tiny_config(), optimizer=sgd, lr_scheduler="constant", warmup_steps=0)
    recorder = Recorder()
    trainer = make_trainer(folder, callbacks=[recorder, *callbacks], **({"max_epochs": 2} | trainer_options))
    trainer.fit(module, data or make_data(), ckpt_path=ckpt_path)
    return module, recorder, trainer
