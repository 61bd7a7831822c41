"""The command line: `lightning-sft fit|validate|test|predict|preview|estimate|find_lr|find_batch_size|export`."""

import logging
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning as L
from jsonargparse import ActionConfigFile, Namespace, auto_cli
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_sft.callbacks import (
    GenerationMonitor,
    HuggingFaceExport,
    LastCheckpoint,
    StepProgressBar,
    TokenThroughput,
)
from lightning_sft.cli.export import export
from lightning_sft.cli.trainer import SFTTrainer
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import MissingFileError, SettingsError, one_line, path_from_here
from lightning_sft.training.checkpoint_files import check_checkpoint, newest_checkpoint
from lightning_sft.training.module import SFTModule
from lightning_sft.training.run_folder import run_folder

_OWN_SETTINGS = (  # the trainer's name, its default, and our name
    ("gradient_clip_val", None, "model.max_grad_norm"),
    ("accumulate_grad_batches", 1, "data.gradient_accumulation_steps"),
)
_FINDING = ("find_lr", "find_batch_size")  # by trial runs, which have trainers of their own
_EXPORT_HELP = "Write a checkpoint's model to a folder that `AutoModelForCausalLM.from_pretrained` loads."


class SFTArgumentParser(LightningArgumentParser):
    """A parser that refuses in one line, without the usage, which is hundreds of lines long."""

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """As it was, but a data file is never taken for a configuration of the argument that names it."""
        options = {"sub_configs": False} if theclass is SFTDataModule else {}
        return super().add_class_arguments(theclass, *args, **(kwargs | options))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and where the settings are explained, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        message = one_line(message)
        if message.startswith("Unexpected config:"):
            got = message.removeprefix("Unexpected config:").strip()
            message = f"a configuration holds `name: value` lines, but this one {f'is {got}' if got else 'is empty'}"
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        self.exit(2, f"lightning-sft: error: {message.rstrip('.')}. Settings are explained by `{command} --help`.\n")


class _ConfigByName(ActionConfigFile):
    """A configuration's path, or the name of one that comes with the package, unless there is a file of that name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if isinstance(values, str) and not Path(values).is_file():
            values = str(packaged_configs().get(values, values))
        super().__call__(parser, cfg, values, option_string)


class _SaveConfig(SaveConfigCallback):
    """Saves a run's settings; those of an evaluation in the same folder do not take their place."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = run_folder(trainer) / self.config_filename
        if stage == "fit" or not trainer.strategy.broadcast(path.is_file()):
            super().setup(trainer, pl_module, stage)


class SFTCLI(LightningCLI):
    """LightningCLI with the callbacks that a fine-tuning run wants, and values given once where two need them."""

    _version_of_last: str | None = None  # of the run that `last` found; empty: the logger begins a new one

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, with a `--config` that also takes the names of the package's configurations."""
        parser = self.parser_class(**kwargs)
        names = ", ".join(packaged_configs())
        words = f"Path to a configuration file, or one of {names}; may be given more than once."
        parser.add_argument("-c", "--config", action=_ConfigByName, help=words)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Expose the callbacks as `--generation.*`, `--best_checkpoint.*`, `--last_checkpoint.*` and `--export.*`."""
        parser.add_lightning_class_args(TokenThroughput, "throughput")  # before callbacks that take time
        parser.add_lightning_class_args(GenerationMonitor, "generation")
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(HuggingFaceExport, "export")
        parser.add_lightning_class_args(StepProgressBar, "progress_bar")
        parser.set_defaults(
            {
                "best_checkpoint.monitor": "val/loss",
                "best_checkpoint.mode": "min",
                "best_checkpoint.filename": "best",
                "best_checkpoint.enable_version_counter": False,
                "best_checkpoint.save_on_train_epoch_end": False,  # at validation, when there is a loss to compare
            }
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ours; each with the arguments that are not the user's."""
        estimate = {"model", "datamodule", "trainer_options", "peak_flops"}
        finding = {name: {"model", "datamodule", "trainer_options"} for name in _FINDING}
        return {**LightningCLI.subcommands(), "preview": {"datamodule"}, "estimate": estimate, **finding}

    def before_instantiate_classes(self) -> None:
        """Pass on what model, data and trainer share."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        for name, default, own in _OWN_SETTINGS:
            if (value := config.trainer[name]) not in (default, None):
                raise SettingsError(f"`trainer.{name}` is {value}, but this model steps by itself. Use `{own}`.")
        if self.subcommand in ("preview", "estimate", *_FINDING):
            config.ckpt_path = None
        if config.get("ckpt_path") == "last":
            self._find_last_checkpoint(config)
        else:
            self._check_ckpt_path(config)
        if config.data.tokenizer is None and isinstance(config.model.model, str):
            config.data.tokenizer = config.model.model
        if isinstance(config.seed_everything, int) and not config.data.seed:
            config.data.seed = config.seed_everything
        config.model.seed = config.data.seed
        if self.subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False  # they are in a file, and may be many
        if not config.trainer.max_epochs and config.trainer.max_steps == -1 and not config.trainer.max_time:
            config.trainer.max_epochs = 1

    def _find_last_checkpoint(self, config: Namespace) -> None:
        """Put the newest complete checkpoint of this configuration's runs in the place of the word `last`."""
        logger = config.trainer.logger
        if logger in (None, True):  # Lightning's default, spelled out
            root = config.trainer.default_root_dir or os.getcwd()
            options = Namespace(save_dir=root, name="lightning_logs", version=None)
            logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=options)
        options = getattr(logger[0] if isinstance(logger, list) else logger, "init_args", Namespace())
        folder = Path(options.get("save_dir") or config.trainer.default_root_dir or ".")
        if logger is not False:
            folder /= options.get("name") or "lightning_logs"
        path = newest_checkpoint(folder)
        config.ckpt_path = None if path is None else str(path)
        config.weights_only = path is not None and path.is_file()  # torch unpickles the folder of a sharded model
        if path is None and self.subcommand != "fit":
            raise MissingFileError(
                f"`ckpt_path` is 'last', but there is no complete checkpoint below {path_from_here(folder)}."
            )
        if path is None:
            rank_zero_info(f"No checkpoint below {path_from_here(folder)} yet: the run starts from its beginning.")
            return
        run = path.parent.parent
        self._version_of_last = ""
        appends = str(getattr(logger, "class_path", "")).endswith("TensorBoardLogger")  # others begin their files anew
        if self.subcommand == "fit" and appends and options.version is None and run != folder:
            options.version = self._version_of_last = run.name  # the curves go on where they stopped
            config.trainer.logger = logger
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")

    def _check_ckpt_path(self, config: Any) -> None:
        """Refuse a checkpoint that cannot be loaded, before anything else is; allow values alone unless told to."""
        path = config.get("ckpt_path")
        if not path:
            return
        if config.weights_only is None:
            config.weights_only = True  # Lightning's default lets a checkpoint from the network run code
        named = path in ("best", "hpc") or path.startswith("registry") or "://" in path
        if not named and config.weights_only:
            check_checkpoint(path, resume=self.subcommand == "fit")

    def instantiate_classes(self) -> None:
        """Build everything; no trainer for `preview` and `estimate`, as their machine may not have the devices."""
        if self.subcommand not in ("preview", "estimate"):
            super().instantiate_classes()
            return
        kinds = {"data": SFTDataModule} | ({"model": SFTModule} if self.subcommand == "estimate" else {})
        parser, config = LightningArgumentParser(), self.config[self.subcommand]
        for name, kind in kinds.items():
            parser.add_lightning_class_args(kind, name)
        built = parser.instantiate_classes(Namespace({name: config[name] for name in kinds}))
        self.datamodule, self.model = built.data, built.get("model")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            self._run_command(subcommand)
        except MisconfigurationException as error:  # what Lightning refuses when a run begins
            raise SettingsError(one_line(error, 2000)) from error

    def _run_command(self, subcommand: str) -> None:
        if subcommand == "preview":
            SFTTrainer.preview(self.datamodule, self.config.preview.num_rows)
        elif subcommand == "estimate":
            config = self.config.estimate
            options = config.trainer.as_dict()
            SFTTrainer.estimate(self.model, self.datamodule, options, config.throughput.peak_flops, config.mfu)
        elif subcommand in _FINDING:
            options = self._get(self.config_init, "trainer")
            found = getattr(SFTTrainer, subcommand)(
                trainer_options=options, **self._prepare_subcommand_kwargs(subcommand)
            )
            rank_zero_only(print)(found)
        else:
            super()._run_subcommand(subcommand)

    def after_instantiate_classes(self) -> None:
        """Refuse a log folder that cannot be written before the data is read."""
        if self.subcommand in ("preview", "estimate", *_FINDING):
            return
        root, loggers = self.trainer.default_root_dir, self.trainer.loggers
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            for folder in {str(logger.save_dir or root) for logger in loggers} or {str(root)}:
                _check_writable(folder)

    def _parse_ckpt_path(self) -> None:
        """Keep what the user says: Lightning would let the checkpoint's hyperparameters override it (#20801)."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer, without the callbacks that its switches turn off (Lightning would refuse them)."""
        if self.subcommand in _FINDING:
            return cast(L.Trainer, None)
        if self.subcommand != "fit":  # the checkpoint comes from another run's folder, and no best one is looked for
            warnings.filterwarnings("ignore", "The dirpath has changed")
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        callbacks = [self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys]
        for switch, kind in (("enable_progress_bar", ProgressBar), ("enable_checkpointing", Checkpoint)):
            if config.get(switch) is False or config.get("barebones"):
                callbacks = [callback for callback in callbacks if not isinstance(callback, kind)]
        # Before the user's, which may put a model's own weights back that generations are to be made without.
        given = config.get("callbacks") or []
        config["callbacks"] = callbacks + (given if isinstance(given, list) else [given])
        try:
            trainer = self._instantiate_trainer(config, [])
        except (MisconfigurationException, ValueError) as error:  # Lightning refuses settings by both
            raise SettingsError(one_line(error, 2000)) from error
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                callback.config = self._without_place(callback.config)
        return trainer

    def _without_place(self, config: Namespace) -> Namespace:
        """The settings of a run without where `last` found it, or whatever is done with them would be done there."""
        if self._version_of_last is not None:
            config = config.clone()
            config.ckpt_path = config.weights_only = None
            if self._version_of_last:
                logger = config.trainer.logger
                (logger[0] if isinstance(logger, list) else logger).init_args.version = None
        return config

    def after_fit(self) -> None:
        """Say where everything is."""
        folder = run_folder(self.trainer)
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        places = {"Run": folder, "Generations": folder / "generations" / "index.html"}
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                places["Last checkpoint"] = folder / "checkpoints" / "last.ckpt"
            elif isinstance(callback, HuggingFaceExport):
                places |= {} if callback.folder is None else {"Model": folder / callback.folder}
            elif best := getattr(callback, "best_model_path", ""):
                places["Best checkpoint"] = Path(best)
        lines = [f"{name + ':':<17}{path_from_here(path)}" for name, path in places.items()]
        print("\n".join([*lines, f"{'Curves:':<17}tensorboard --logdir {path_from_here(folder.parent)}"]))


def _check_writable(folder: str) -> None:
    if "://" in folder:
        return
    path = Path(folder).absolute()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "may not be written" if nearest.is_dir() else "is a file"
        raise SettingsError(
            f"The logs are to be written to {folder}, but {nearest} {why}. Set `trainer.default_root_dir`, or the "
            "logger's `save_dir`, to another folder."
        )


def packaged_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: beside the package, or inside an installed one."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _silence_lightning() -> None:
    """Drop what Lightning prints that no user of this program can act on: advertisements, and its own deprecation."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")  # a step is done when it saves
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # of a sharded model: a better one, meant to


def build(args: list[str] | dict[str, Any] | None = None, run: bool = True) -> SFTCLI:
    """Parse arguments and build model, data and trainer; `run=False` does not start anything.

    Args:
        args: Arguments as a list or a nested dictionary; those of the command line if None.
        run: Whether `args` names a subcommand to be run.
    """
    return SFTCLI(
        SFTModule,
        SFTDataModule,
        trainer_class=SFTTrainer,
        args=args,
        run=run,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # they are the module's
        save_config_callback=_SaveConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False},
        parser_class=SFTArgumentParser,
        parser_kwargs={
            "allow_abbrev": False,
            "prog": "lightning-sft",
            "version": version("lightning-sft"),
            "epilog": "lightning-sft export: " + _EXPORT_HELP,
        },
    )


def main() -> None:
    """Entry point. Without any argument `fit` runs the quickstart, `preview` shows its data, `estimate` its needs, and
    `find_lr` and `find_batch_size` find settings for it; with nothing but `--ckpt_path last`, `fit` continues the run
    below `runs` that saved a checkpoint most recently.

    A `SettingsError` ends in one line; any other exception keeps its traceback.
    """
    if sys.argv[1:] in (["fit"], ["preview"], ["estimate"], *([name] for name in _FINDING)):
        sys.argv += ["--config", str(packaged_configs()["quickstart"])]
    elif sys.argv[1:] in (["fit", "--ckpt_path", "last"], ["fit", "--ckpt_path=last"]):
        newest = newest_checkpoint(Path("runs"))
        if newest is None:
            sys.exit(
                "lightning-sft: error: there is no complete checkpoint below `runs`. Give a `--config` to start with."
            )
        sys.argv[2:] = ["--config", str(newest.parent.parent / "config.yaml"), "--ckpt_path", "last"]
    _silence_lightning()
    try:
        if sys.argv[1:2] == ["export"]:
            options: dict[str, Any] = {"prog": "lightning-sft export", "parser_class": SFTArgumentParser}
            auto_cli(export, sys.argv[2:], as_positional=False, description=_EXPORT_HELP, **options)
        else:
            build()
    except UnicodeDecodeError as error:  # data and templates have messages of their own
        sys.exit(f"lightning-sft: error: a configuration is not UTF-8 text ({error.reason}). Save the file as UTF-8.")
    except SettingsError as error:
        sys.exit(f"lightning-sft: error: {one_line(error, 2000)}")
