"""Which folder the settings of a command give to its run, before anything is built of them."""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lightning_sft.checks import check_local
from lightning_sft.cli.claimed_folders import ClaimedFolders
from lightning_sft.cli.save_settings import read_further_loggers
from lightning_sft.errors import SettingsError, path_from_here
from lightning_sft.training.checkpoint_files import newest_checkpoint
from lightning_sft.training.run_folder import folder_of_run, holds_a_run


@dataclass(frozen=True)
class LoggerArguments:
    """The names of a logger's arguments that say where its runs are.

    Attributes:
        name: The argument that names the folder of its runs, below `save_dir`.
        version: The argument that names a run's folder in that.
        if_unnamed: The folder of its runs if the argument `name` is null or empty.
    """

    name: str = "name"
    version: str = "version"
    if_unnamed: str = ""

    def folder_name(self, options: Namespace) -> str:
        """The folder of its runs, below `save_dir`."""
        return options.get(self.name, "lightning_logs") or self.if_unnamed


_NUMBERED = ("TensorBoardLogger", "CSVLogger")  # whose runs are `version_0`, `version_1`, ...
_OF_LOGGERS = {
    "TensorBoardLogger": LoggerArguments(),
    "CSVLogger": LoggerArguments(),
    "WandbLogger": LoggerArguments("project", "id", os.environ.get("WANDB_PROJECT", "lightning_logs")),
    "MLFlowLogger": LoggerArguments("experiment_name", "run_id"),
}


class RunSettings:
    """The loggers and folders in the settings of a command, which are changed in place."""

    def __init__(self, config: Namespace) -> None:
        self._config = config

    @property
    def root(self) -> Path:
        """`default_root_dir`, which must be no address."""
        folder = self._config.trainer.default_root_dir or os.getcwd()
        check_local("trainer.default_root_dir", folder)
        return Path(folder)

    def _loggers(self) -> Iterator[Any]:
        logger = self._config.trainer.logger
        if isinstance(logger, list):
            yield from logger
        elif logger not in (None, True, False):
            yield logger

    @cached_property
    def _first(self) -> Any:
        """The settings of the first logger, also of Lightning's default; None if there is none."""
        if self._config.trainer.logger in (None, True):
            options = Namespace(save_dir="", name="lightning_logs", version=None)
            return Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=options)
        return next(self._loggers(), None)

    @property
    def _kind(self) -> str:
        return str(getattr(self._first, "class_path", "")).rpartition(".")[2]

    @property
    def _options(self) -> Namespace:
        options: Namespace = getattr(self._first, "init_args", Namespace())
        return options

    def place_loggers(self) -> None:
        """Have relative folders of loggers begin in `default_root_dir`."""
        for logger in self._loggers():
            options = getattr(logger, "init_args", Namespace())
            for name in ("save_dir", "dir"):
                if (folder := options.get(name)) is not None and "://" not in str(folder):
                    options[name] = str(self.root / folder)

    @property
    def folder(self) -> Path:
        """Where the runs with these settings are, each in a folder of its own; MLflow's a level deeper."""
        if self._first is None:
            return self.root
        options, arguments = self._options, _OF_LOGGERS.get(self._kind, LoggerArguments())
        if self._kind == "MLFlowLogger" and (uri := options.get("tracking_uri")):
            return Path(uri.removeprefix("file:")) if uri.startswith("file:") else self.root
        folder = self.root / (options.get("dir") or options.get("save_dir") or "")
        return folder if self._kind == "MLFlowLogger" else folder / arguments.folder_name(options)

    def newest_checkpoint(self, fits: Callable[[Path], bool] = lambda run: True) -> Path | None:
        """The last checkpoint of that run which saved one most recently, of those that fit."""
        return newest_checkpoint(self.folder, lambda run: fits(run) and self._is_of_experiment(run))

    def _is_of_experiment(self, run: Path) -> bool:
        """Whether a run's folder is one of these; MLflow names those of an experiment by a number."""
        if self._kind != "MLFlowLogger":
            return True
        config = run / "config.yaml"
        settings = (yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None) or {}
        logger = (settings.get("trainer") or {}).get("logger")
        first = logger[0] if isinstance(logger, list) and logger else logger
        options = first.get("init_args") or {} if isinstance(first, dict) else {}
        return bool(options) and options.get("experiment_name") == self._options.get("experiment_name")

    def continue_in(self, run: Path) -> None:
        """Let a run go on in the folder that it has, where its logger appends to what it has written.

        It gets another folder if these settings keep their runs elsewhere: it was moved, or is to go on there.
        """
        arguments = _OF_LOGGERS.get(self._kind)
        parent = run.parent.parent if self._kind == "MLFlowLogger" else run.parent
        home = self.folder.resolve()
        is_here = parent.resolve() == home if self._first is not None else run.resolve().is_relative_to(home)
        if not is_here:
            words = f"The run in {path_from_here(run)} goes on in a new folder below {path_from_here(self.folder)}"
            rank_zero_info(f"{words}, where these settings keep runs.")
            return
        if self._first is None:
            self._config.trainer.default_root_dir = str(run)
            return
        self._continue_further(run)
        if arguments is None or self._options.get(arguments.version) is not None:
            return
        self._options[arguments.version] = run.name
        if self._config.trainer.logger in (None, True):
            self._config.trainer.logger = self._first
        if self._kind == "CSVLogger":  # it deletes what an earlier part of the run has written
            _begin_table(run)

    def _continue_further(self, run: Path) -> None:
        """Let the loggers beyond the first go on, too; of each kind in the order in which the run had them."""
        known = read_further_loggers(run)
        for logger in list(self._loggers())[1:]:
            kind, options = str(logger.class_path).rpartition(".")[2], getattr(logger, "init_args", Namespace())
            found = next((each for each in known if each.kind == kind), None)
            arguments = _OF_LOGGERS.get(kind)
            if found is None or arguments is None or options.get(arguments.version) is not None:
                continue
            known.remove(found)
            options[arguments.version] = found.version
            if kind == "CSVLogger":
                folder = self.root / (options.get("save_dir") or "") / arguments.folder_name(options)
                version = f"version_{found.version}" if isinstance(found.version, int) else str(found.version)
                _begin_table(folder / version)

    def choose_folder(self, ckpt_path: str | None, trains: bool) -> None:
        """Let a training run have a folder that no other run has.

        Args:
            ckpt_path: The checkpoint that is started from, whose run may go on in its folder, or be evaluated there.
            trains: Whether it is a training run.
        """
        own = None if ckpt_path is None else Path(ckpt_path).absolute().parent.parent
        if own is not None:  # it is meant to be there
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        if self._first is None:
            if trains or (own is not None and own.is_relative_to(self.root.absolute())):
                self._config.trainer.default_root_dir = str(folder_of_run(self.root, ckpt_path))
            return
        arguments = _OF_LOGGERS.get(self._kind)
        version = None if arguments is None else self._options.get(arguments.version)
        if arguments is None or version is None or not trains:
            return
        folder = self.folder / (f"version_{version}" if isinstance(version, int) else str(version))
        if self._kind == "MLFlowLogger":
            folder = next(self.folder.glob(f"*/{version}"), folder)
        if holds_a_run(folder) and (own is None or folder.resolve() != own.resolve()):
            raise SettingsError(
                f"`{arguments.version}` of the logger is {version!r}, but {path_from_here(folder)} holds another run. "
                "Leave it out, and the run gets a folder of its own; or continue that run: `--ckpt_path last`."
            )

    def claim_folders(self, claimed: ClaimedFolders) -> None:
        """Choose the numbers of a run's folders and make these, before the data is read."""
        trainer = self._config.trainer
        if trainer.logger in (None, True) and not trainer.get("barebones"):
            trainer.logger = self._first
        for logger in self._loggers():
            kind = str(getattr(logger, "class_path", "")).rpartition(".")[2]
            options = getattr(logger, "init_args", None)
            if kind not in _NUMBERED or options is None or options.get("version") is not None:
                continue
            folder = options.get("save_dir") or ""
            if "://" not in str(folder):
                options.version = claimed.claim(self.root / folder / _OF_LOGGERS[kind].folder_name(options))


@rank_zero_only
def _begin_table(folder: Path) -> None:
    """Let a CSV logger begin another table in the folder of a run that continues; the one before gets another name."""
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    table, number = folder / "metrics.csv", 1
    while table.with_stem(f"metrics_part_{number}").exists():
        number += 1
    if table.is_file():
        table.rename(table.with_stem(f"metrics_part_{number}"))
