"""`LastCheckpoint` in real runs."""

import csv
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO
from support.callbacks import ROWS, fit
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_model

from lightning_sft import HuggingFaceExport, LastCheckpoint, SFTDataModule, SFTModule


def test_the_last_checkpoint_is_the_last_step_even_where_nothing_validates(tmp_path):
    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)
    _, trainer = fit(tmp_path, [LastCheckpoint(every_n_steps=2)], data=data, max_steps=5)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == trainer.global_step == 5


def test_lightning_s_writer_in_a_thread_writes_beside_the_checkpoint_before(tmp_path, monkeypatch):
    data, last = SFTDataModule(character_tokenizer(), ROWS, batch_size=4), tmp_path / "checkpoints" / "last.ckpt"
    written = []

    def watched(checkpoint, file, save=torch.save):
        written.append((Path(file.name).name, torch.load(last)["global_step"] if last.exists() else None))
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", watched)
    fit(tmp_path, [LastCheckpoint(every_n_steps=1)], data=data, max_steps=2, plugins=[AsyncCheckpointIO()])
    assert written == [(".last.ckpt.partial", None), (".last.ckpt.partial", 1)]
    assert torch.load(last)["global_step"] == 2


@pytest.mark.filterwarnings("ignore:.*Trainer configured with multiple .ModelCheckpoint. callbacks")
def test_best_is_what_lightning_s_checkpoint_found_wherever_it_stands(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    data = SFTDataModule(character_tokenizer(), ROWS, ROWS[:5], batch_size=4)
    module, trainer = fit(tmp_path, [HuggingFaceExport(), LastCheckpoint(), best], data=data, max_epochs=1)
    (found,) = trainer.validate(module, data, ckpt_path="best", verbose=False)
    assert found["val/loss"] == pytest.approx(float(best.best_model_score))


def test_best_is_the_last_where_no_other_checkpoint_is_kept(tmp_path):
    """Which is what Lightning evaluates where it is given no module."""
    data = SFTDataModule(character_tokenizer(), ROWS, ROWS[:5], batch_size=4)
    trainer = fit(tmp_path, [LastCheckpoint()], data=data, max_steps=3)[1]
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "checkpoints" / "last.ckpt")
    (found,) = trainer.validate(datamodule=data, ckpt_path="best", verbose=False)
    assert found["step"] == 3


class SavedTable(L.Callback):
    """Logs by itself, and reads at each checkpoint which steps the table on the disk has."""

    def __init__(self, path):
        self.path, self.found = path, []

    def on_train_batch_end(self, trainer, *args):
        trainer.logger.log_metrics({"mine": 1.0}, trainer.global_step)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        with open(self.path) as file:
            self.found.append([int(row["step"]) for row in csv.DictReader(file)])


def test_what_was_logged_before_a_checkpoint_is_on_the_disk_before_it(tmp_path):
    """Killed right after it, the run goes on from there."""
    data, table = SFTDataModule(character_tokenizer(), ROWS, batch_size=4), SavedTable(tmp_path / "metrics.csv")
    options = {"data": data, "logger": CSVLogger(tmp_path, "", ""), "log_every_n_steps": 100, "max_steps": 2}
    fit(tmp_path, [table, LastCheckpoint(every_n_steps=1)], **options)
    assert table.found == [[1], [1, 2]]


class Saved(L.Callback):
    def __init__(self):
        self.steps = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.steps.append(trainer.global_step)


def test_over_a_loader_alone_the_interval_of_validation_begins_with_each_epoch(tmp_path):
    """Epochs of three steps, of which the second is validated after."""
    data, saved = SFTDataModule(character_tokenizer(), ROWS, ROWS[:3], batch_size=4), Saved()
    options = {"max_epochs": 2, "val_check_interval": 2, "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, callbacks=[saved, LastCheckpoint(every_n_steps=2)], **options)
    trainer.fit(SFTModule(tiny_model()), data.train_dataloader(), data.val_dataloader())
    assert saved.steps == [2, 4, 5, 6]


def test_a_callback_that_is_used_again_saves_again(tmp_path):
    data, callback = SFTDataModule(character_tokenizer(), ROWS, batch_size=4), LastCheckpoint()
    for name in ("first", "second"):
        fit(tmp_path / name, [callback], data=data, max_steps=2)
        assert (tmp_path / name / "checkpoints" / "last.ckpt").is_file()


def test_two_are_refused_since_signals_would_not_be_given_back(tmp_path):
    with pytest.raises(ValueError, match="There are two `LastCheckpoint`s, which would write the same file"):
        fit(tmp_path, [LastCheckpoint(), LastCheckpoint(every_n_steps=1)], max_steps=1)


class Terminate(L.Callback):
    def on_sanity_check_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_before_the_first_step_is_obeyed_after_it(tmp_path):
    """Lightning, which receives it, would end with the exit code 0 and save nothing. The step is logged, too."""
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, [Terminate(), LastCheckpoint()], logger=CSVLogger(tmp_path, "", ""), num_sanity_val_steps=1)
    assert end.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1
    with open(tmp_path / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["1"]
