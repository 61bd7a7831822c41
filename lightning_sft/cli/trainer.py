"""Lightning's trainer, with the subcommands that are ours."""

from typing import Any

import lightning as L
from rich.console import Console

from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.planning.batch_sizes import BatchSizes, find_batch_size
from lightning_sft.planning.estimate import estimate_run
from lightning_sft.planning.learning_rates import LearningRates, find_lr
from lightning_sft.training.module import SFTModule


class SFTTrainer(L.Trainer):
    """Lightning's trainer: devices, precision, length of the run, logging.

    Subcommands of a LightningCLI are methods of its trainer, so `preview` and what finds settings are, too.
    """

    @staticmethod
    def preview(
        datamodule: SFTDataModule, num_rows: int = 3, ckpt_path: str | None = None, weights_only: bool | None = None
    ) -> None:
        """Print some training rows as the model will see them, and statistics of the data; nothing is trained.

        Args:
            datamodule: The data.
            num_rows: How many rows.
            ckpt_path: Not used, but allowed, since the `config.yaml` of a run has it.
            weights_only: Likewise.
        """
        Console().print(datamodule.preview(num_rows))

    @staticmethod
    def estimate(
        model: SFTModule,
        datamodule: SFTDataModule,
        trainer_options: dict[str, Any],
        peak_flops: float | None,
        mfu: float = 0.4,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print the memory and time that `fit` would need; no weights are read, no device is used, nothing is trained.

        Args:
            model: The model.
            datamodule: The data.
            trainer_options: Of the run's trainer.
            peak_flops: Of a device.
            mfu: Share of the devices' arithmetic (`--throughput.peak_flops`) that is assumed to be put to use.
            ckpt_path: Not used, but allowed, since the `config.yaml` of a run has it.
            weights_only: Likewise.
        """
        Console().print(estimate_run(model, datamodule, trainer_options, mfu, peak_flops))

    @staticmethod
    def find_lr(
        model: SFTModule,
        datamodule: SFTDataModule,
        trainer_options: dict[str, Any],
        min_lr: float = 1e-7,
        max_lr: float = 1e-1,
        num_steps: int = 100,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> LearningRates:
        """Print the loss while the learning rate rises, and a rate to begin with; nothing is saved.

        Args:
            model: The model.
            datamodule: The data.
            trainer_options: Of the run's trainer.
            min_lr: Rate of the first optimizer step.
            max_lr: Rate of the last one, unless the loss is twice its lowest before.
            num_steps: Optimizer steps.
            ckpt_path: Not used, but allowed, since the `config.yaml` of a run has it.
            weights_only: Likewise.
        """
        return find_lr(model, datamodule, min_lr, max_lr, num_steps, **trainer_options)

    @staticmethod
    def find_batch_size(
        model: SFTModule,
        datamodule: SFTDataModule,
        trainer_options: dict[str, Any],
        memory_gib: float | None = None,
        margin: float = 0.1,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> BatchSizes:
        """Print the most tokens in a microbatch that a CUDA device has memory for, found by trying; nothing is saved.

        Args:
            model: The model.
            datamodule: The data.
            trainer_options: Of the run's trainer.
            memory_gib: Memory that the process may take of its CUDA device, in GiB. Default: all that is free.
            margin: Share of the tokens to leave out, for what tries do not show.
            ckpt_path: Not used, but allowed, since the `config.yaml` of a run has it.
            weights_only: Likewise.
        """
        return find_batch_size(model, datamodule, memory_gib, margin, **trainer_options)
