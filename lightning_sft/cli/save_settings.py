"""`config.yaml`: the settings of a run in its folder."""

from pathlib import Path

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from lightning_sft.cli.further_loggers import save_further_loggers
from lightning_sft.training.run_folder import run_folder, use_folder


class SaveSettings(SaveConfigCallback):
    """Saves a run's settings `as_given` in its folder; those of an evaluation there do not take their place."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, as_given: Namespace | None = None) -> None:
        super().__init__(parser, config if as_given is None else as_given, save_to_log_dir=False)
        self._folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save the settings."""
        use_folder(trainer, Path(trainer.default_root_dir))
        self._folder = run_folder(trainer)  # every process has to ask
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save them, unless a training run has."""
        path = self._folder / self.config_filename
        if stage == "fit" or not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, skip_validation=True, overwrite=True)
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_further_loggers(trainer.loggers, path.parent)
