"""What a run's folder keeps of its settings: `config.yaml`, and `loggers.yaml` where there is more than one logger.

The first logger names the folder. A run that continues goes on in those of the others, too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger

from lightning_sft.training.run_folder import run_folder, use_folder

_FURTHER_LOGGERS = "loggers.yaml"


class SaveSettings(SaveConfigCallback):
    """Saves a run's settings `as_given` in its folder; those of an evaluation there do not take their place.

    Where a run continues with other settings, those before are kept in `config_until_step_<N>.yaml`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, as_given: Namespace | None = None) -> None:
        super().__init__(parser, config if as_given is None else as_given, save_to_log_dir=False)
        self._folder, self._continues = Path(), config.get("ckpt_path") is not None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save the settings; those of a run that continues may still be refused."""
        use_folder(trainer, Path(trainer.default_root_dir))
        self._folder = run_folder(trainer)  # every process has to ask
        if stage != "fit" or not self._continues:
            super().setup(trainer, pl_module, stage)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save the settings of a run that continues, once it does."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save them, unless a training run has."""
        path = self._folder / self.config_filename
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if stage == "fit" or before is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)
        kept = path.with_stem(f"{path.stem}_until_step_{trainer.global_step}")
        if trainer.global_step and before not in (None, path.read_text(encoding="utf-8")) and not kept.exists():
            kept.write_text(str(before), encoding="utf-8")
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_further_loggers(trainer.loggers, path.parent)


@dataclass(frozen=True)
class FurtherLogger:
    """The name of a logger's class, and what the logger calls the run; None if it has no name for it."""

    kind: str
    version: str | int | None


def save_further_loggers(loggers: Sequence[Logger], folder: Path) -> None:
    """Note in a run's folder what its loggers beyond the first call the run."""
    found = [FurtherLogger(type(logger).__name__, logger.version) for logger in loggers[1:]]
    if found:
        (folder / _FURTHER_LOGGERS).write_text(yaml.safe_dump([asdict(each) for each in found]), encoding="utf-8")


def read_further_loggers(folder: Path) -> list[FurtherLogger]:
    """What `save_further_loggers` has noted; nothing where it has not."""
    path = folder / _FURTHER_LOGGERS
    return [FurtherLogger(**each) for each in yaml.safe_load(path.read_text("utf-8"))] if path.is_file() else []
