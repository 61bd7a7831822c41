"""The loggers of a run beyond the first, which names its folder: a run that continues goes on in theirs, too."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from lightning.pytorch.loggers import Logger

_FILE = "loggers.yaml"


@dataclass(frozen=True)
class FurtherLogger:
    """The name of a logger's class, and what the logger calls the run; None if it has no name for it."""

    kind: str
    version: str | int | None


def save_further_loggers(loggers: Sequence[Logger], folder: Path) -> None:
    """Note in a run's folder what its loggers beyond the first call the run."""
    found = [FurtherLogger(type(logger).__name__, logger.version) for logger in loggers[1:]]
    if found:
        (folder / _FILE).write_text(yaml.safe_dump([asdict(each) for each in found]), encoding="utf-8")


def read_further_loggers(folder: Path) -> list[FurtherLogger]:
    """What `save_further_loggers` has noted; nothing where it has not."""
    path = folder / _FILE
    return [FurtherLogger(**each) for each in yaml.safe_load(path.read_text("utf-8"))] if path.is_file() else []
