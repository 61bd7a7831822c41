"""What each command does.

A command is a function. It is given what its settings are built into by name: `model`, `datamodule`, `trainer` ... (see
`SFTCLI.run`). Its other parameters are settings of its own, which its docstring explains to users. What no other
command uses is imported in the function, so that the others do not wait for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from lightning_sft.cli.best_responses import best_responses
from lightning_sft.cli.export import export
from lightning_sft.cli.places import tell_places
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import path_from_here
from lightning_sft.inspection.inspect_rows import Split, inspect_rows
from lightning_sft.training.checkpoint_weights import InitialWeights
from lightning_sft.training.module import SFTModule


def fit(
    trainer: L.Trainer,
    model: SFTModule,
    datamodule: SFTDataModule,
    ckpt_path: str | None,
    weights_only: bool | None,
    init_from: str | None = None,
) -> None:
    """Train, and print where the results are.

    Args:
        trainer: The trainer.
        model: The model.
        datamodule: The data.
        ckpt_path: Checkpoint to continue from.
        weights_only: Whether to refuse a checkpoint that could run code.
        init_from: Checkpoint whose weights a new run begins with. Its optimizer, schedule, position in the data and
            step number are not used.
    """
    if init_from is not None:
        model.initial_weights = InitialWeights(Path(init_from), weights_only is not False)
    trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only)
    tell_places(trainer)


def validate(
    trainer: L.Trainer, model: SFTModule, datamodule: SFTDataModule, ckpt_path: str | None, weights_only: bool | None
) -> None:
    """Evaluate on the validation rows."""
    trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only)


def test(
    trainer: L.Trainer, model: SFTModule, datamodule: SFTDataModule, ckpt_path: str | None, weights_only: bool | None
) -> None:
    """Evaluate on the test rows, and answer all of their prompts."""
    trainer.test(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only)


def predict(
    trainer: L.Trainer, model: SFTModule, datamodule: SFTDataModule, ckpt_path: str | None, weights_only: bool | None
) -> None:
    """Write responses to prompts into a file."""
    trainer.predict(
        model,
        datamodule=datamodule,
        return_predictions=False,  # they are in the file, and may be many
        ckpt_path=ckpt_path,
        weights_only=weights_only,
    )


def inspect(
    trainer: L.Trainer,
    model: SFTModule,
    datamodule: SFTDataModule,
    ckpt_path: str | None,
    weights_only: bool | None,
    split: Split = "train",
    num_rows: int = 1000,
    folder: str | None = None,
) -> None:
    """Compute the loss of each row, and write a page with the highest loss first and JSON lines with all rows.

    Args:
        trainer: The trainer.
        model: The model.
        datamodule: The data.
        ckpt_path: Checkpoint whose weights to score with. Default: the model as it is before training.
        weights_only: Whether to refuse a checkpoint that could run code.
        split: Which rows: `train`, `val` or `test`.
        num_rows: Number of rows on the page: those with the highest loss.
        folder: Where to write both. Default: `inspection` in the folder of the checkpoint's run, or in
            `trainer.default_root_dir`.
    """
    found = inspect_rows(trainer, model, datamodule, split, num_rows, folder, ckpt_path, weights_only)
    summary = dict(found.summary)
    num_seen = summary.pop("num_rows")
    words = ", ".join(f"{name} {value:.4f}" for name, value in summary.items())
    rank_zero_only(print)(
        f"{num_seen:,.0f} rows: {words}\nPage: {path_from_here(found.page)}\nRows: {path_from_here(found.rows)}"
    )


def preview(datamodule: SFTDataModule, num_rows: int = 3) -> None:
    """Print some training rows as the model will see them, and statistics of the data; nothing is trained.

    Args:
        datamodule: The data.
        num_rows: How many rows.
    """
    Console().print(datamodule.preview(num_rows))


def estimate(
    model: SFTModule,
    datamodule: SFTDataModule,
    trainer_settings: Mapping[str, Any],
    peak_flops: float | None,
    mfu: float = 0.4,
) -> None:
    """Print the memory and time that `fit` would need; no weights are read, no device is used, nothing is trained.

    Args:
        model: The model.
        datamodule: The data.
        trainer_settings: Those of the run's trainer, as they are written.
        peak_flops: Of a device.
        mfu: Model FLOP utilisation to assume: the fraction of `--throughput.peak_flops` that training reaches.
    """
    from lightning_sft.planning.estimate import estimate_run

    Console().print(estimate_run(model, datamodule, trainer_settings, mfu, peak_flops))


def find_lr(
    model: SFTModule,
    datamodule: SFTDataModule,
    trainer_options: dict[str, Any],
    min_lr: float = 1e-7,
    max_lr: float = 1e-1,
    num_steps: int = 100,
) -> None:
    """Print the loss while the learning rate rises, and suggest a rate; nothing is saved.

    Args:
        model: The model.
        datamodule: The data.
        trainer_options: Arguments of the run's trainer.
        min_lr: Rate of the first optimizer step.
        max_lr: Rate of the last one, unless the loss rises to twice its lowest value before.
        num_steps: Number of optimizer steps.
    """
    from lightning_sft.planning import learning_rates

    found = learning_rates.find_lr(model, datamodule, min_lr, max_lr, num_steps, **trainer_options)
    rank_zero_only(print)(found)


def find_batch_size(
    model: SFTModule,
    datamodule: SFTDataModule,
    trainer_options: dict[str, Any],
    memory_gib: float | None = None,
    margin: float = 0.1,
) -> None:
    """Print the largest number of tokens per microbatch that fits into memory, found by trying; nothing is saved.

    Args:
        model: The model.
        datamodule: The data.
        trainer_options: Arguments of the run's trainer.
        memory_gib: Memory of the CUDA device that the process may use, in GiB. Default: all that is free.
        margin: Fraction of the tokens to leave out, for memory that the tries do not show.
    """
    from lightning_sft.planning import batch_sizes

    found = batch_sizes.find_batch_size(model, datamodule, memory_gib, margin, **trainer_options)
    rank_zero_only(print)(found)


def compare(
    runs: list[str], output: str = "comparison.html", names: list[str] | None = None, step: int | None = None
) -> None:
    """Compare runs on a page: their curves, and their answers to the same prompts.

    Args:
        runs: At least two: folders of runs, or files of records.
        output: File of the page, ending in .html; an existing page is replaced.
        names: Names of the runs, such as `[base, tuned]`. Default: the parts of their paths in which they differ.
        step: Optimizer step of each folder whose responses are compared. Default: the last of each.
    """
    from lightning_sft.results.comparison import compare_runs

    print(compare_runs(runs, output, names, step))


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        function: What it does.
        parts: The parts of a configuration that it uses, such as `data` for `--data.*`. Others are accepted, since a
            run's `config.yaml` has them all, but not looked at.
        words: The setting that is a list of words, given without its name; None if it has none.
    """

    function: Callable[..., None]
    parts: frozenset[str]
    words: str | None = None


_RUN = frozenset({"trainer", "model", "data", "generation", "progress_bar"})
_TRAINING = _RUN | {"throughput", "best_checkpoint", "last_checkpoint", "export"}
_TRIALS = frozenset({"trainer", "model", "data"})

COMMANDS = {
    "fit": Command(fit, _TRAINING),
    "validate": Command(validate, _RUN),
    "test": Command(test, _RUN),
    "predict": Command(predict, _RUN),
    "inspect": Command(inspect, frozenset({"trainer", "model", "data", "progress_bar"})),
    "preview": Command(preview, frozenset({"data"})),
    "estimate": Command(estimate, frozenset({"trainer", "model", "data", "throughput"})),
    "find_lr": Command(find_lr, _TRIALS),
    "find_batch_size": Command(find_batch_size, _TRIALS),
    "compare": Command(compare, frozenset(), words="runs"),
    "best_responses": Command(best_responses, frozenset()),
    "export": Command(export, frozenset()),
}
