"""Where a run keeps its files, and who writes them."""

from pathlib import Path

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run: the logger's, or `default_root_dir` where there is no logger.

    Every process has to ask, since `log_dir` broadcasts the folder from the first one.

    Args:
        trainer: The run's trainer.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def writes_files(trainer: L.Trainer) -> bool:
    """Whether this process writes a run's files: the first one does, and none in a `fast_dev_run`."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
