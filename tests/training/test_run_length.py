"""How long a run is, when it is validated, and when it ends early: all counted in optimizer steps."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.fits import ROWS, fit, make_data, make_trainer, sgd
from support.models import tiny_config

from lightning_sft import SFTModule


def test_max_epochs_counts_epochs_and_max_steps_counts_optimizer_steps(tmp_path):
    assert fit(tmp_path, max_epochs=3)[2].global_step == 9
    assert fit(tmp_path, max_epochs=-1, max_steps=7)[2].global_step == 7
    assert fit(tmp_path, max_epochs=2, max_steps=100)[2].global_step == 6


def test_the_trainer_is_given_back_as_it_was(tmp_path):
    trainer = fit(tmp_path, max_epochs=2, limit_train_batches=2, data=make_data(val_data=ROWS[:5]))[2]
    assert (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches) == (2, -1, 2)
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (1.0, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, 6]),  # at each epoch's end
        ({"val_check_interval": 0.4}, [1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 2}, [2, 4, 6]),
        ({"val_check_interval": 4}, [4]),  # over epochs
        ({"check_val_every_n_epoch": 2}, [6]),
        ({"max_steps": 2}, [2]),  # shorter than an epoch
        ({"limit_train_batches": 2}, [2, 4]),
        ({"limit_val_batches": 0}, []),
    ],
)
def test_validation_runs_when_it_is_expected(tmp_path, options, expected):
    assert fit(tmp_path, data=make_data(val_data=ROWS[:5]), **options)[1].validated == expected


def test_an_interval_longer_than_the_run_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    assert fit(tmp_path, data=make_data(val_data=ROWS[:5]), val_check_interval=7)[1].validated == []
    assert "no validation: `trainer.val_check_interval` is 7 optimizer steps, the run 6." in caplog.text


def test_limit_train_batches_takes_the_first_steps_of_each_epoch(tmp_path):
    everything, limited = fit(tmp_path)[1], fit(tmp_path, limit_train_batches=2)[1]
    assert limited.rows == [everything.rows[i] for i in (0, 1, 3, 4)]
    assert fit(tmp_path, limit_train_batches=0.4)[2].global_step == 2


def test_overfit_batches_repeats_the_same_rows(tmp_path):
    module = SFTModule(tiny_config(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02), lr_scheduler="constant")
    _, recorder, _ = fit(tmp_path, module, overfit_batches=1, max_epochs=30)
    assert len(recorder.rows) == 30
    assert all(rows == recorder.rows[0] for rows in recorder.rows)
    assert recorder.losses[-1] < 0.5 * recorder.losses[0]


def test_fast_dev_run_takes_one_step_and_validates(tmp_path):
    _, recorder, trainer = fit(tmp_path, data=make_data(val_data=ROWS[:5]), fast_dev_run=True)
    assert (trainer.global_step, recorder.validated) == (1, [1])


def test_max_time_ends_a_run_without_a_length(tmp_path):
    module = SFTModule(tiny_config(), lr_scheduler="constant")
    trainer = fit(tmp_path, module, max_epochs=-1, max_time={"seconds": 1})[2]
    assert trainer.global_step > 0


def test_a_run_over_a_loader_alone_has_the_length_of_its_epochs(tmp_path):
    module = SFTModule(tiny_config(), optimizer=sgd, lr_scheduler="linear", warmup_steps=0.5)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, make_data().train_dataloader(), make_data(val_data=ROWS[:2]).val_dataloader())
    assert trainer.global_step == 6
    schedule = module.lr_schedulers()
    assert [0.3 * schedule.lr_lambdas[0](step) for step in range(7)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.2, 0.1, 0])


def test_a_schedule_over_a_run_without_a_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`lr_scheduler` is 'cosine'.*Set `max_steps`"):
        fit(tmp_path, SFTModule(tiny_config()), max_epochs=-1, max_time={"seconds": 1})


def test_no_run_begins_as_one_that_early_stopping_has_ended_and_such_a_one_says_so(tmp_path, caplog):
    stop = EarlyStopping("val/loss", patience=0, min_delta=100.0)  # the first is the best; then nothing is better
    data = {"val_data": ROWS[:6]}
    trainer = fit(tmp_path, data=make_data(**data), callbacks=[stop], max_epochs=1)[2]
    assert trainer.global_step == 3
    trainer.fit_loop.max_epochs = 4
    trainer.fit(trainer.lightning_module, trainer.datamodule)
    assert trainer.global_step == 6
    trainer = fit(tmp_path, data=make_data(**data), callbacks=[stop], max_epochs=1)[2]
    assert trainer.global_step == 3
    assert "EarlyStopping" not in caplog.text
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, trainer.datamodule)
    assert trainer.global_step == 3
    assert "no more is trained than `min_steps` asks for. To train on, leave the callback out." in caplog.text


def test_early_stopping_and_the_best_checkpoint_follow_the_validation_loss(tmp_path):
    module = SFTModule(tiny_config(), optimizer=lambda p: torch.optim.SGD(p, lr=40.0), lr_scheduler="constant")
    stop = EarlyStopping("val/loss", patience=2)
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best", save_on_train_epoch_end=False)
    seen = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["val/loss"].item())

    _, recorder, trainer = fit(
        tmp_path,
        module,
        make_data(val_data=ROWS[:6]),
        callbacks=[Watch(), stop, best],
        enable_checkpointing=True,
        max_epochs=50,
        val_check_interval=1,
    )
    assert trainer.global_step < 150
    assert best.best_model_score.item() == min(seen)
    assert seen.index(min(seen)) == len(seen) - 3
    assert torch.load(best.best_model_path)["global_step"] == recorder.validated[-3]
