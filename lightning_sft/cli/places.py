"""Where a run writes: that it can, and what lies there in the end."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_sft.callbacks import HuggingFaceExport, LastCheckpoint
from lightning_sft.errors import SettingsError, path_from_here, why_not_written
from lightning_sft.training.run_folder import check_run_folder_is_local, run_folder


def check_log_folders(trainer: L.Trainer) -> None:
    """Refuse a log folder that cannot be written, before the data is read."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    check_run_folder_is_local(trainer)
    root = trainer.default_root_dir
    for folder in {str(logger.save_dir or root) for logger in trainer.loggers} or {str(root)}:
        if "://" in folder:
            continue
        if (why := why_not_written(Path(folder))) is not None:
            raise SettingsError(
                f"The logs are to be written to {folder}, but {why}. Set `trainer.default_root_dir`, or the "
                "logger's `save_dir`, to another folder."
            )


def tell_places(trainer: L.Trainer) -> None:
    """Print where everything is that a training run has left; every process has to call this."""
    folder = run_folder(trainer)
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    places, generations = {"Run": folder}, folder / "generations" / "index.html"
    if generations.is_file():  # not where `generation.num_prompts` is 0
        places["Generations"] = generations
    for callback in trainer.checkpoint_callbacks:
        places |= _place_of(callback, folder)
    lines = [f"{name + ':':<17}{path_from_here(path)}" for name, path in places.items()]
    curves = [f"{'Curves:':<17}{words}" for logger in trainer.loggers if (words := _curves(logger))]
    print("\n".join([*lines, *curves]))


def _curves(logger: Logger) -> str:
    """How to look at what a logger has kept; nothing for those that this package does not know."""
    if isinstance(logger, TensorBoardLogger):
        return f"tensorboard --logdir {path_from_here(Path(logger.log_dir).parent)}"
    if isinstance(logger, CSVLogger):
        return str(path_from_here(Path(logger.log_dir, "metrics.csv")))
    if isinstance(logger, WandbLogger):
        run = logger.experiment
        return str(run.url or f"wandb sync {path_from_here(Path(run.dir).parent)}")
    if isinstance(logger, MLFlowLogger):
        uri = logger.experiment.tracking_uri
        folder = uri.removeprefix("file:")
        return f"mlflow ui --backend-store-uri {uri if folder == uri else path_from_here(Path(folder))}"
    return ""


def _place_of(callback: Any, folder: Path) -> dict[str, Path]:
    if isinstance(callback, LastCheckpoint):
        return {"Last checkpoint": folder / "checkpoints" / "last.ckpt"}
    if isinstance(callback, HuggingFaceExport):
        return {} if callback.folder is None else {"Model": folder / callback.folder}
    best = getattr(callback, "best_model_path", "")
    return {"Best checkpoint": Path(best)} if best else {}
