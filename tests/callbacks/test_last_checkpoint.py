"""`LastCheckpoint` in real runs."""

import os
import signal

import lightning as L
import pytest
import torch
from support.callbacks import ROWS, fit
from support.models import character_tokenizer

from lightning_sft import LastCheckpoint, SFTDataModule


def test_the_last_checkpoint_is_the_last_step_even_where_nothing_validates(tmp_path):
    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)
    _, trainer = fit(tmp_path, [LastCheckpoint(every_n_steps=2)], data=data, max_steps=5)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == trainer.global_step == 5


def test_a_callback_that_is_used_again_saves_again(tmp_path):
    data, callback = SFTDataModule(character_tokenizer(), ROWS, batch_size=4), LastCheckpoint()
    for name in ("first", "second"):
        fit(tmp_path / name, [callback], data=data, max_steps=2)
        assert (tmp_path / name / "checkpoints" / "last.ckpt").is_file()


class Terminate(L.Callback):
    def on_sanity_check_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_the_first_step_is_obeyed_after_it(tmp_path):
    """Lightning, which receives it, would end with the exit code 0 and save nothing."""
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, [Terminate(), LastCheckpoint()], num_sanity_val_steps=1)
    assert end.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1
