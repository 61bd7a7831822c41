"""Where a run keeps its files, and who writes them."""

from pathlib import Path
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_sft.checks import check_local

_OF_A_RUN = ("config.yaml", "checkpoints/[!.]*", "huggingface")  # without these it was killed before it saved anything
# Of trainers without a logger, which would give each run a version: found before there is anything of the run itself.
_chosen: WeakKeyDictionary[L.Trainer, Path] = WeakKeyDictionary()


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of a run, as its first logger names it. Every process has to ask: the first one tells the others.

    For TensorBoard and CSV it is `log_dir`; for loggers whose `save_dir` holds all of their runs, such as Weights &
    Biases and MLflow, `<save_dir>/<name>/<version>`, where Lightning puts checkpoints too. Without a logger it is
    `default_root_dir`, or `version_<N>` below if that holds a run that is not continued, which is known once training
    starts. An address, such as `s3://bucket`, is refused.
    """
    check_run_folder_is_local(trainer)
    folder = str(_folder(trainer)) if trainer.is_global_zero else ""
    return Path(trainer.strategy.broadcast(folder))


def check_run_folder_is_local(trainer: L.Trainer) -> None:
    """Refuse a run whose files would be at an address, to which checkpoints, pages and exports are not written."""
    if trainer.loggers and (save_dir := trainer.loggers[0].save_dir):
        check_local("trainer.loggers[0].save_dir", save_dir)
    else:
        check_local("trainer.default_root_dir", trainer.default_root_dir)


def _folder(trainer: L.Trainer) -> Path:
    root = trainer.default_root_dir
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return Path(root)
    if not trainer.loggers:
        if trainer.state.fn == "fit" and trainer not in _chosen:
            _chosen[trainer] = folder_of_run(Path(root), trainer.ckpt_path)
        return _chosen.get(trainer, Path(root))
    logger = trainer.loggers[0]
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or root, str(logger.name), version)


def use_folder(trainer: L.Trainer, folder: Path) -> None:
    """Have a run without a logger keep its files in a folder that was found for it."""
    if not trainer.loggers:
        _chosen[trainer] = folder


def holds_a_run(folder: Path) -> bool:
    """Whether a folder holds what a run leaves."""
    return any(next(folder.glob(pattern), None) is not None for pattern in _OF_A_RUN)


def folder_of_run(root: Path, ckpt_path: str | Path | None) -> Path:
    """The folder of a training run without a logger, in `root`, its `default_root_dir`.

    It is that of the checkpoint which is continued from, if that is in `root` or below. Otherwise it is `root` itself,
    or the first `version_<N>` below it that holds no run.
    """
    if ckpt_path:
        own = Path(ckpt_path).absolute().parent.parent
        if own.is_relative_to(root.absolute()):
            return own
    folder, number = root, 0
    while holds_a_run(folder):
        folder, number = root / f"version_{number}", number + 1
    return folder


def writes_files(trainer: L.Trainer) -> bool:
    """Whether this process writes a run's files: the first one does, and none in a `fast_dev_run`."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
