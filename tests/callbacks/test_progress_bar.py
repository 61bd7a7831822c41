"""`StepProgressBar` in a real run."""

import pytest
from support.callbacks import ROWS, fit
from support.cuda import NEEDS_CUDA
from support.models import character_tokenizer

from lightning_sft import SFTDataModule, StepProgressBar


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=NEEDS_CUDA)])
def test_the_progress_bar_shows_the_latest_loss_that_need_not_be_waited_for(accelerator, tmp_path):
    """On a GPU that is the loss of the step before."""
    shown, losses = [], []

    class Watched(StepProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            shown.append(self.get_metrics(trainer, pl_module).get("loss"))
            losses.append(trainer.callback_metrics["train/loss"].item())

    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)
    settings = {"max_steps": 5, "log_every_n_steps": 100, "accelerator": accelerator}
    fit(tmp_path, [Watched()], data=data, enable_progress_bar=True, **settings)
    assert len(set(losses)) == 5
    assert shown == (losses if accelerator == "cpu" else [None, *losses[:-1]])


def test_the_progress_bar_goes_on_through_all_epochs(tmp_path):
    seen = []

    class Watched(StepProgressBar):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            seen.append((self.train_progress_bar.completed, self.train_progress_bar.total))

    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)  # 3 steps an epoch
    fit(tmp_path, [Watched()], data=data, enable_progress_bar=True, max_epochs=3)
    assert seen == [(step, 9) for step in range(1, 10)]
