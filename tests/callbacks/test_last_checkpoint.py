"""`LastCheckpoint` in real runs."""

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
