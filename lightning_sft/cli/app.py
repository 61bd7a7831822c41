"""The command line of a command: LightningCLI with the callbacks that a fine-tuning run wants."""

import inspect
import logging
import sys
import warnings
from argparse import SUPPRESS
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_sft.callbacks import (
    GenerationMonitor,
    HuggingFaceExport,
    LastCheckpoint,
    StepProgressBar,
    TokenThroughput,
)
from lightning_sft.cli.checkpoints import (
    check_ckpt_path,
    check_init_from,
    check_no_other_job,
    config_of_newest_run,
    find_last_checkpoint,
    find_own_checkpoint,
    named_run,
)
from lightning_sft.cli.claimed_folders import ClaimedFolders
from lightning_sft.cli.commands import COMMANDS
from lightning_sft.cli.main import SUMMARIES
from lightning_sft.cli.parser import ConfigByName, SFTArgumentParser, packaged_configs
from lightning_sft.cli.places import check_log_folders
from lightning_sft.cli.run_settings import RunSettings
from lightning_sft.cli.save_settings import SaveSettings
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import SettingsError, one_line
from lightning_sft.model.stored_adapters import tokenizer_beside
from lightning_sft.training.module import SFTModule

_PARTS: dict[str, type] = {  # of a configuration
    "trainer": L.Trainer,
    "model": SFTModule,
    "data": SFTDataModule,
    "throughput": TokenThroughput,  # before callbacks that take time
    "generation": GenerationMonitor,
    "best_checkpoint": ModelCheckpoint,
    "last_checkpoint": LastCheckpoint,
    "export": HuggingFaceExport,
    "progress_bar": StepProgressBar,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "trainer": {"log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False},
    "best_checkpoint": {
        "monitor": "val/loss",
        "mode": "min",
        "filename": "best",
        "enable_version_counter": False,
        "save_on_train_epoch_end": False,  # at validation, when there is a loss to compare
    },
    "last_checkpoint": {"requeue": True},  # the command continues from what it saves
}
_CKPT_PATH_HELP = (
    "Checkpoint to start from. `last`: the newest complete one of the run whose `config.yaml` is given as `--config`, "
    "otherwise of all runs with these settings; without one, `fit` begins a new run."
)
_RUNS_HELP = (
    "At least two, each the folder of a run or a file of records: one that `predict` wrote, or one from a run's folder "
    "`generations`. The others are compared with the first, such as the base model."
)
_WEIGHTS_ONLY_HELP = "Refuse a checkpoint that could run code. Default: true."


class SFTCLI(LightningCLI):
    """LightningCLI for one command: only the parts of a configuration that it uses are looked at and built."""

    def __init__(self, name: str, words: list[str], claimed: ClaimedFolders) -> None:
        self.name, self.command, self._claimed = name, COMMANDS[name], claimed
        self._parameters = inspect.signature(self.command.function).parameters
        places = "RUN RUN... " if self.command.words else ""
        super().__init__(
            SFTModule,
            SFTDataModule,
            args=words,
            run=False,  # Lightning's own subcommands would be methods of its trainer
            seed_everything_default=0,
            auto_configure_optimizers=False,  # they are the module's
            save_config_callback=SaveSettings,
            save_config_kwargs={},
            parser_class=SFTArgumentParser,
            parser_kwargs={
                "allow_abbrev": False,
                "prog": f"lightning-sft {name}",
                "usage": f"%(prog)s {places}[--config NAME_OR_FILE] [--SETTING VALUE ...]",
                "description": SUMMARIES[name],
            },
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "SFTCLI":
        """Itself: the optimizer of a module that it has made refers to it, and averages of weights copy the module."""
        return self

    # -- the parser ------------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's parser, with a `--config` that also takes the names of the package's configurations."""
        parser = self.parser_class(**kwargs)
        names = ", ".join(packaged_configs())
        words = f"Path to a configuration file, or one of {names}; may be given more than once."
        parser.add_argument("-c", "--config", action=ConfigByName, help=words)
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        words = (
            "Seed of everything random, including the data unless `data.seed` is not 0. True: any seed. False: none."
        )
        words = words if self.command.parts else SUPPRESS
        parser.add_argument("--seed_everything", type=bool | int, default=self.seed_everything_default, help=words)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the parts that the command uses; accept the others, which a run's `config.yaml` has, unseen."""
        for part, kind in _PARTS.items():
            if part not in self.command.parts:
                parser.add_argument(f"--{part}", type=dict[str, Any], default={}, help=SUPPRESS)
                continue
            parser.add_lightning_class_args(kind, part)
            parser.set_defaults({f"{part}.{name}": value for name, value in _DEFAULTS.get(part, {}).items()})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the command's own settings, and the checkpoint that a run starts from."""
        built: set[str | int] = {"model", "datamodule", "trainer", "trainer_options", "trainer_settings", "peak_flops"}
        if "trainer" in self._parameters:
            built |= {"ckpt_path", "weights_only"}
            parser.add_argument("--ckpt_path", type=str | None, default=None, help=_CKPT_PATH_HELP)
            parser.add_argument("--weights_only", type=bool | None, default=None, help=_WEIGHTS_ONLY_HELP)
        for name in {"ckpt_path", "weights_only", "init_from"} - self._parameters.keys():
            parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)
        if self.command.words:
            built.add(self.command.words)
            parser.add_argument(self.command.words, nargs="+", type=str, metavar="RUN", help=_RUNS_HELP)
        parser.add_function_arguments(self.command.function, skip=built)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command's words; Lightning's own method would warn that the program has arguments as well."""
        self.config = parser.parse_args(args)

    # -- what is built ---------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Pass on what model, data and trainer share, and find the checkpoint."""
        config, parts = self.config, self.command.parts
        if "data" in parts:
            model = config.model.get("model")
            if config.data.tokenizer is None and isinstance(model, str):
                revision = (config.model.get("model_kwargs") or {}).get("revision")
                config.data.tokenizer = tokenizer_beside(model, revision)
            if config.seed_everything and not config.data.seed:  # it may be False
                config.data.seed = config.seed_everything
        if "model" in parts:
            config.model.seed = config.data.seed
        if "trainer" in parts and config.trainer.max_epochs is None and config.trainer.max_steps == -1:
            config.trainer.max_epochs = None if config.trainer.max_time else 1
        if "trainer" in self._parameters:
            self._choose_checkpoint()
        elif self.name == "export" and config.ckpt_path == "last" and named_run(config) is not None:
            find_last_checkpoint(config, continues=False)

    def _choose_checkpoint(self) -> None:
        config, trains = self.config, self.name == "fit"
        # Saved as found, the settings would have whatever is done with them later be done in that folder or place.
        self.save_config_kwargs["as_given"] = as_given = config.clone()
        found = trains and find_own_checkpoint(config)
        if config.init_from is not None:
            check_init_from(config, trains)
        as_given.init_from = None
        if as_given.ckpt_path == "last":
            as_given.ckpt_path = as_given.weights_only = None
            if not found:
                find_last_checkpoint(config, trains)
        for name in ("ckpt_path", "weights_only", "init_from"):
            if as_given[name] is None:  # or `--ckpt_path last --config RUN/config.yaml` would end with none
                del as_given[name]
        check_no_other_job(config)
        check_ckpt_path(config, trains)
        if self.name == "inspect":
            config.trainer.logger = False  # what it finds is on the page
        elif self.name != "predict" and not config.trainer.fast_dev_run:
            settings = RunSettings(config)
            settings.choose_folder(config.ckpt_path, trains)
            settings.claim_folders(self._claimed)

    def instantiate_classes(self) -> None:
        """Build the parts that the command uses, and a trainer of them if it asks for one."""
        config = self.config.clone()
        if "trainer" in self.command.parts:
            RunSettings(config).place_loggers()
        if "trainer_settings" in self._parameters:
            del config["trainer"]  # nothing of it is built: this machine may not have the devices
        try:
            self.config_init = self.parser.instantiate_classes(config)
        except ValueError as error:  # what a callback refuses comes wrapped: it stands in a list
            if isinstance(error.__cause__, SettingsError):
                raise SettingsError(str(error.__cause__)) from error
            raise
        self.model = self.config_init.model if "model" in self.command.parts else None
        self.datamodule = self.config_init.data if "data" in self.command.parts else None
        if "trainer" in self._parameters:
            self.trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """Refuse a log folder that cannot be written before the data is read."""
        if "trainer" in self._parameters:
            check_log_folders(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer, without the callbacks that its switches turn off (Lightning would refuse them)."""
        if self.name != "fit":  # the checkpoint comes from a run whose callbacks take no part
            warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
        config = {**self.config_init.trainer, **kwargs}
        callbacks = [self.config_init[key] for key in self.parser.callback_keys]
        saving = (Checkpoint, HuggingFaceExport)
        for switch, kinds in (("enable_progress_bar", ProgressBar), ("enable_checkpointing", saving)):
            if config.get(switch) is False or config.get("barebones"):
                callbacks = [callback for callback in callbacks if not isinstance(callback, kinds)]
        # Before the user's, which may put a model's own weights back that generations are to be made without.
        given = config.get("callbacks") or []
        config["callbacks"] = callbacks + (given if isinstance(given, list) else [given])
        try:
            return self._instantiate_trainer(config, [])
        except (MisconfigurationException, ValueError) as error:  # Lightning refuses settings by both
            raise SettingsError(one_line(error, 2000)) from error

    # -- what is run -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Call the command's function with what it asks for."""
        offered = {
            **self.config_init,
            "model": self.model,
            "datamodule": self.datamodule,
            "trainer": getattr(self, "trainer", None),
            "trainer_options": {**self.config_init.get("trainer", {})},
            "trainer_settings": self.config.as_dict()["trainer"],
            "peak_flops": self.config.throughput.get("peak_flops"),
        }
        try:
            self.command.function(**{name: offered[name] for name in self._parameters})
        except MisconfigurationException as error:  # what Lightning refuses when a run begins
            raise SettingsError(one_line(error, 2000)) from error


def run_command(words: list[str]) -> SFTCLI:
    """Run a command; return what it was run with: `model`, `datamodule`, `trainer` and `config`."""
    claimed = ClaimedFolders()
    try:
        cli = SFTCLI(words[0], words[1:], claimed)
        cli.run()
        return cli
    finally:
        claimed.remove_unused()


def main() -> None:
    """Run the command that the program's arguments name.

    Without further arguments `fit` runs the quickstart, `preview` shows its data, `estimate` its needs, and `find_lr`
    and `find_batch_size` find settings for it; with nothing but `--ckpt_path last`, `fit` continues the run below
    `runs` that saved a checkpoint most recently.

    A `SettingsError` ends in one line; any other exception keeps its traceback.
    """
    _silence_lightning()
    try:
        # In place: further processes are started so.
        if sys.argv[1:] in (["fit"], ["preview"], ["estimate"], ["find_lr"], ["find_batch_size"]):
            sys.argv += ["--config", str(packaged_configs()["quickstart"])]
        elif sys.argv[1:] in (["fit", "--ckpt_path", "last"], ["fit", "--ckpt_path=last"]):
            sys.argv[2:] = ["--config", str(config_of_newest_run()), "--ckpt_path", "last"]
        run_command(sys.argv[1:])
        if dist.is_initialized():  # by gloo, whose threads can abort the program if they still run while Python ends
            dist.destroy_process_group()
    except SettingsError as error:
        sys.exit(f"lightning-sft: error: {one_line(error, 2000)}")


def _silence_lightning() -> None:
    """Drop what Lightning prints that no user of this program can act on: advertisements, and its own deprecation."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")  # of a sharded model: a better one, meant to
