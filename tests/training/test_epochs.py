"""Epochs of the trainer are those of the data, and a run that continues goes on in them where it was."""

import csv
import json
import multiprocessing
from datetime import timedelta
from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from support.fits import ROWS, make_data, make_trainer, sgd
from support.models import tiny_config
from support.runs import adamw

from lightning_sft import SFTModule

VALIDATION = {"val_data": ROWS[:5]}


class Events:
    """What happens in a run, in order; with a folder, a checkpoint after each event, named by the event's number."""

    def __init__(self, folder=None):
        self.events, self.folder = [], folder

    def note(self, trainer, kind, *values, save=True):
        self.events.append((kind, trainer.current_epoch, trainer.global_step, *values))
        if save and self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{len(self.events) - 1}.ckpt")

    def on_train_epoch_start(self, trainer, pl_module):
        self.note(trainer, "epoch starts", save=False)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.callback_metrics["train/loss"].item()
        self.note(trainer, "step", batch_idx, trainer.is_last_batch, loss, sorted(batch.locations))

    def on_validation_end(self, trainer, pl_module):
        self.note(trainer, "validation", trainer.callback_metrics["val/loss"].item())

    def on_train_epoch_end(self, trainer, pl_module):
        self.note(trainer, "epoch ends")

    def on_train_end(self, trainer, pl_module):
        self.note(trainer, "run ends", save=False)


class EventCallback(Events, L.Callback):
    """Has its hooks before checkpoint callbacks and those that stop a run early."""


class EventCheckpoint(Events, Checkpoint):
    """Has its hooks after those of other callbacks."""


def run(folder, data, *, kind=EventCallback, ckpt_path=None, module=None, callbacks=(), **options):
    """The events of a run, which has AdamW and dropout."""
    if folder is not None:
        folder.mkdir()
    recorder = kind(folder)
    module = module or SFTModule(tiny_config(attention_dropout=0.2), optimizer=adamw, warmup_steps=1)
    callbacks = [recorder, *callbacks]
    has_checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = make_trainer(".", callbacks=callbacks, **({"enable_checkpointing": has_checkpoints} | options))
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert multiprocessing.active_children() == []
    return recorder.events


def saved(folder):
    return sorted(int(path.stem) for path in folder.iterdir())


# Three steps an epoch, unless the trainer limits them.
CASES = {
    "epochs": ({}, {"max_epochs": 3}),
    "steps, validated at each epoch's end": (VALIDATION, {"max_steps": 7}),
    "validated less often than once an epoch": (
        VALIDATION,
        {"max_epochs": 3, "limit_train_batches": 2, "val_check_interval": 3},
    ),
    "epochs of one step": (VALIDATION, {"max_epochs": 4, "limit_train_batches": 1, "val_check_interval": 2}),
    "stream": (VALIDATION | {"streaming": True, "shuffle_buffer": 7}, {"max_steps": 7, "val_check_interval": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_anywhere_as_it_would_have_gone_on(tmp_path, case):
    """From each step, validation and end of an epoch; from the first one's last step, also from each later end."""
    settings, options = CASES[case]
    if "streaming" in settings:
        settings = settings | {"train_data": str(write_rows(tmp_path))}
    data, folder = make_data(**settings), tmp_path / "straight"
    kind = EventCheckpoint if "epochs" in case else EventCallback
    straight = run(folder, data, kind=kind, **options)
    ends = [step for (_, epoch, step, *_), (_, later, *_) in pairwise(straight) if later > epoch]
    for number in saved(folder):
        part = tmp_path / f"from_{number}"
        events = run(part, data, kind=kind, ckpt_path=folder / f"{number}.ckpt", **options)
        assert events == straight[number + 1 :]
        if straight[number][0] == "step" and straight[number][2] == ends[0]:
            for later in (each for each in saved(part) if events[each][2] in ends):
                events_then = run(None, data, kind=kind, ckpt_path=part / f"{later}.ckpt", **options)
                assert events_then == straight[number + later + 2 :]


def write_rows(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("num_steps", [4, 6])
def test_a_run_that_had_ended_goes_on_where_it_was(tmp_path, num_steps):
    straight = run(None, make_data(), max_steps=8)
    first = run(tmp_path / "first", make_data(), max_steps=num_steps)
    last = tmp_path / "first" / f"{len(first) - 2}.ckpt"  # saved at the end of the epoch that the run's end cut short
    further = run(None, make_data(), max_steps=8, ckpt_path=last)
    kept = [event for event in straight if event[0] != "step"]
    ends = {("epoch ends", 1, 4), ("run ends", 2, 4), ("run ends", 2, 6)}  # of the first part alone
    assert [event for event in (*first, *further) if event[0] != "step" and event not in ends] == kept
    steps = [
        [event[:5] + event[6:] for event in events if event[0] == "step"] for events in (straight, first + further)
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_scheduler_that_asks_for_the_length_of_the_run_leaves_the_position_alone(tmp_path, streaming):
    """Lightning then asks for the loader, and of a stream for its first step, before the checkpoint is restored."""

    class Estimating(SFTModule):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 9
            return adamw(self.parameters())

    def again(folder, **how):
        return run(folder, data, module=Estimating(tiny_config()), max_epochs=3, max_steps=9, **how)

    data = make_data(train_data=str(write_rows(tmp_path)), streaming=streaming)
    straight = again(tmp_path / "straight")
    for number in saved(tmp_path / "straight")[1:5]:  # around the end of the first epoch
        assert again(None, ckpt_path=tmp_path / "straight" / f"{number}.ckpt") == straight[number + 1 :]


def test_workers_go_on_from_one_epoch_to_the_next(tmp_path, monkeypatch):
    started = []
    start = multiprocessing.Process.start
    monkeypatch.setattr(multiprocessing.Process, "start", lambda self: (started.append(self), start(self)))
    data = make_data(num_workers=1)
    assert [event[1] for event in run(None, data, max_epochs=4) if event[0] == "step"] == [0] * 3 + [1] * 3 + [
        2
    ] * 3 + [3] * 3
    assert len(started) == 1


def test_loaders_may_be_made_anew_in_each_epoch(tmp_path):
    asked = []

    class Counting(type(make_data())):
        def train_dataloader(self):
            asked.append(self.trainer.current_epoch)
            return super().train_dataloader()

    counting = Counting(make_data().tokenizer, ROWS, batch_size=8)
    straight, options = run(None, make_data(), max_epochs=3), {"reload_dataloaders_every_n_epochs": 1}
    assert run(None, counting, max_epochs=3, **options) == straight
    assert asked == [0, 1, 2]


# -- streams ----------------------------------------------------------------------------------------------------------


def test_an_epoch_of_a_stream_ends_before_the_step_whose_last_row_is_of_the_next(tmp_path):
    """22 rows in steps of 8: the third step ends with rows 1 and 2, the sixth with rows 1 to 4."""
    data = make_data(train_data=str(write_rows(tmp_path)), streaming=True)
    events = run(None, data, max_steps=9)
    assert [event[1] for event in events if event[0] == "step"] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [event[1:3] for event in events if event[0] == "epoch ends"] == [(0, 2), (1, 5), (2, 8), (3, 9)]
    assert [event[2] for event in run(None, data, max_steps=9, max_epochs=2) if event[0] == "step"] == [1, 2, 3, 4, 5]


# -- what counts epochs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({}, {"every_n_epochs": 1}, [3, 6, 9]),
        ({}, {"every_n_epochs": 2}, [6]),
        (VALIDATION, {"every_n_epochs": 1}, [3, 6, 9]),
        (VALIDATION, {"every_n_epochs": 2}, [6]),
        (VALIDATION, {"every_n_epochs": 2, "save_on_train_epoch_end": True}, [6]),
    ],
)
def test_model_checkpoint_counts_epochs(tmp_path, settings, options, expected):
    every = ModelCheckpoint(tmp_path, save_top_k=-1, **options)
    run(None, make_data(**settings), max_epochs=3, callbacks=[every])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"epoch={step // 3}-step={step}.ckpt" for step in expected]  # epochs that have been gone through


def test_early_stopping_looks_at_the_end_of_an_epoch_also_right_after_a_continuation(tmp_path):
    def stopping():  # the first epoch is the best; no other is better
        return [EarlyStopping("train/loss", patience=1, min_delta=100.0, check_on_train_epoch_end=True)]

    options = {"max_epochs": 5, "kind": EventCheckpoint}
    straight = run(tmp_path / "straight", make_data(), callbacks=stopping(), **options)
    assert [event[:3] for event in straight[-2:]] == [("epoch ends", 1, 6), ("run ends", 2, 6)]
    for num_left in (2, 1):  # after the last step; and after the epoch's end, where the run has been stopped already
        saved = tmp_path / "straight" / f"{len(straight) - num_left - 1}.ckpt"
        events = run(None, make_data(), callbacks=stopping(), ckpt_path=saved, **options)
        assert events == straight[-num_left:]


def test_learning_rate_monitor_and_timer_count_epochs(tmp_path):
    logger, monitor = CSVLogger(tmp_path, name="", version=0), LearningRateMonitor("epoch")
    run(None, make_data(), max_epochs=3, logger=logger, log_every_n_steps=1, callbacks=[monitor])
    with open(tmp_path / "version_0" / "metrics.csv") as file:
        assert len([row for row in csv.DictReader(file) if row["lr-AdamW"]]) == 3
    timer = Timer(timedelta(microseconds=1), interval="epoch")
    assert run(None, make_data(), max_epochs=3, callbacks=[timer])[-1] == ("run ends", 1, 3)


class Unfreezing(L.Callback):
    """What is refused of `BaseFinetuning`, in the way that its message names."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.model.get_input_embeddings().requires_grad_(trainer.current_epoch >= 1)


def test_layers_are_unfrozen_at_their_epoch_also_in_a_run_that_continues(tmp_path):
    def module():
        return SFTModule(tiny_config(tie_word_embeddings=False), optimizer=sgd, lr_scheduler="constant", warmup_steps=0)

    class Weights(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weights[trainer.global_step] = pl_module.model.get_input_embeddings().weight.detach().clone()

    weights = {}
    straight = run(tmp_path / "s", make_data(), module=module(), callbacks=[Unfreezing(), Weights()], max_epochs=2)
    changed = [not torch.equal(weights[step], weights[step + 1]) for step in range(1, 6)]
    assert changed == [False, False, True, True, True]
    last = weights[6]
    for number in (2, 6):  # in each epoch
        path = tmp_path / "s" / f"{number}.ckpt"
        options = {"module": module(), "callbacks": [Unfreezing(), Weights()], "max_epochs": 2}
        assert run(None, make_data(), ckpt_path=path, **options) == straight[number + 1 :]
        assert torch.equal(weights[6], last)


def test_hooks_of_a_subclass_come_once_an_epoch():
    class Counting(SFTModule):
        def on_train_epoch_start(self):
            hooks.append(("start", self.current_epoch))

        def on_train_epoch_end(self):
            hooks.append(("end", self.current_epoch))

    hooks = []
    run(None, make_data(), module=Counting(tiny_config()), max_epochs=3)
    assert hooks == [(hook, epoch) for epoch in range(3) for hook in ("start", "end")]
