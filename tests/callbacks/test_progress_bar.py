"""`StepProgressBar` in a real run."""

from support.callbacks import ROWS, fit
from support.models import character_tokenizer

from lightning_sft import SFTDataModule, StepProgressBar


def test_the_progress_bar_reads_numbers_at_logging_steps_only(tmp_path):
    """Reading one makes the host wait for the device."""
    read = []

    class Watched(StepProgressBar):
        def _read(self, trainer, pl_module):
            read.append(trainer.global_step)
            return super()._read(trainer, pl_module)

    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)
    fit(tmp_path, [Watched()], data=data, enable_progress_bar=True, max_steps=9, log_every_n_steps=4)
    assert set(read) <= {0, 1, 4, 8, 9}


def test_the_progress_bar_goes_on_through_all_epochs(tmp_path):
    seen = []

    class Watched(StepProgressBar):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            seen.append((self.train_progress_bar.completed, self.train_progress_bar.total))

    data = SFTDataModule(character_tokenizer(), ROWS, batch_size=4)  # 3 steps an epoch
    fit(tmp_path, [Watched()], data=data, enable_progress_bar=True, max_epochs=3)
    assert seen == [(step, 9) for step in range(1, 10)]
