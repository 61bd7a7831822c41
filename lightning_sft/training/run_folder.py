"""Where a run keeps its files, and who writes them."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

_OF_A_RUN = ("config.yaml", "checkpoints", "generations", "huggingface")


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run, which the first logger names; `default_root_dir` where there is no logger.

    TensorBoard's and CSV's is their `log_dir`. Of others, such as Weights & Biases and MLflow, it is
    `<save_dir>/<name>/<version>`, where Lightning puts checkpoints too: their `save_dir` holds all of their runs.

    Every process has to ask, since the first one tells the others.

    Args:
        trainer: The run's trainer.
    """
    folder = str(_folder(trainer)) if trainer.is_global_zero else ""
    return Path(trainer.strategy.broadcast(folder))


def _folder(trainer: L.Trainer) -> Path:
    root = trainer.default_root_dir
    if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return Path(root)
    logger = trainer.loggers[0]
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or root, str(logger.name), version)


def holds_a_run(folder: Path) -> bool:
    """Whether a folder holds what a run leaves."""
    return any((folder / name).exists() for name in _OF_A_RUN)


def unused_folder(root: Path) -> Path:
    """The folder itself, or the first `version_<N>` below it that holds no run."""
    folder, number = root, 0
    while holds_a_run(folder):
        folder, number = root / f"version_{number}", number + 1
    return folder


def writes_files(trainer: L.Trainer) -> bool:
    """Whether this process writes a run's files: the first one does, and none in a `fast_dev_run`."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
