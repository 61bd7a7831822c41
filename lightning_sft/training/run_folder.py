"""Where a run keeps its files."""

from pathlib import Path

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run: the logger's, or `default_root_dir` where there is no logger.

    Every process has to ask, since `log_dir` broadcasts the folder from the first one.

    Args:
        trainer: The run's trainer.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
