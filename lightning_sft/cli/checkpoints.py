"""The checkpoint that a command starts from: which one `last` is, and whether it can be loaded."""

import os
from pathlib import Path

from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.cli.run_settings import RunSettings
from lightning_sft.errors import MissingFileError, SettingsError, path_from_here
from lightning_sft.training.checkpoint_files import check_checkpoint, is_complete, newest_checkpoint
from lightning_sft.training.slurm_job import is_of_this_step, is_restarted

_OF_A_RUN = ("checkpoints/*.ckpt", "hparams.yaml", "generations")  # a `config.yaml` without these is the user's own


def find_own_checkpoint(config: Namespace) -> bool:
    """Let a job that SLURM has started again go on with its own run, whatever that was told to begin from.

    Args:
        config: Settings of `fit`; `ckpt_path`, `init_from` and the logger's version are changed in it.

    Returns:
        Whether there is such a run.
    """
    if not is_restarted():
        return False
    settings = RunSettings(config)
    path = settings.newest_checkpoint(is_of_this_step)
    if path is None:
        return False
    rank_zero_info(f"SLURM has restarted this job: its run continues from {path_from_here(path)}.")
    config.ckpt_path, config.init_from = str(path), None
    settings.continue_in(path.parent.parent)
    return True


def find_last_checkpoint(config: Namespace, continues: bool) -> None:
    """Put the newest complete checkpoint in the place of the word `last`: of the `named_run`, or of all runs.

    Those are the runs with this configuration. A training run that is found goes on in its own folder, where its
    logger appends to what it has written.

    Args:
        config: Settings of the command; `ckpt_path` and the logger's version are changed in it.
        continues: Whether a training is to go on, rather than weights to be evaluated.
    """
    settings, run = RunSettings(config), named_run(config)
    if run is None:
        path, place = settings.newest_checkpoint(), f"below {path_from_here(settings.folder)}"
    else:
        last = run / "checkpoints" / "last.ckpt"
        path, place = last if is_complete(last) else None, f"of the run in {path_from_here(run)}"
    config.ckpt_path = None if path is None else str(path)
    if path is None and not continues:
        raise MissingFileError(f"`ckpt_path` is 'last', but there is no complete checkpoint {place}.")
    if path is None:
        rank_zero_info(f"No checkpoint {place} yet: a new run starts from the beginning.")
    elif continues:
        settings.continue_in(path.parent.parent)


def named_run(config: Namespace) -> Path | None:
    """The folder of the run whose `config.yaml` is given as `--config`; None if there is none, or more than one."""
    files = {Path(os.path.abspath(path)) for path in config.config or () if path is not None}
    runs = [file.parent for file in files if file.name == "config.yaml"]
    runs = [run for run in runs if any(next(run.glob(pattern), None) is not None for pattern in _OF_A_RUN)]
    return runs[0] if len(runs) == 1 else None


def config_of_newest_run() -> Path:
    """The settings of the run below `runs` that saved a checkpoint most recently."""
    newest = newest_checkpoint(Path("runs"))
    if newest is None:
        raise MissingFileError("there is no complete checkpoint below `runs`. Give a `--config` to start with.")
    config = newest.parent.parent / "config.yaml"
    if not config.is_file():
        raise MissingFileError(
            f"the newest checkpoint below `runs`, {newest}, has no {config} beside it: its run was started in Python "
            "and has to be continued there, with `trainer.fit(..., ckpt_path=...)`. Give a `--config` to start another."
        )
    return config


def check_no_other_job(config: Namespace) -> None:
    """Refuse what Lightning would start from unasked under SLURM."""
    if config.ckpt_path is not None or SLURMEnvironment.job_id() is None or is_restarted():
        return
    if path := next(RunSettings(config).root.glob("hpc_ckpt_*.ckpt"), None):
        raise SettingsError(
            f"There is {path_from_here(path)}, which Lightning loads under SLURM, whatever run it belongs to. Move it "
            "away, or set `trainer.default_root_dir` to another folder; give it as `ckpt_path` to start from it."
        )


def check_ckpt_path(config: Namespace, continues: bool) -> None:
    """Refuse a checkpoint that cannot be loaded, or that could run code unless the user allows that.

    Args:
        config: Settings of the command; `weights_only` is set in it.
        continues: Whether a training is to go on, which takes more than weights.
    """
    path = config.ckpt_path
    if path is None:
        return
    if path == "best":
        raise SettingsError(
            "`ckpt_path` is 'best', but only the program that trained the run knows which checkpoint that is. Give its "
            "path, such as runs/quickstart/version_0/checkpoints/best.ckpt."
        )
    if config.weights_only is None:
        config.weights_only = True  # Lightning's default lets a checkpoint from the network run code
    named = path == "hpc" or path.startswith("registry") or "://" in path
    if not named and config.weights_only:
        check_checkpoint(path, resume=continues)


def check_init_from(config: Namespace, begins: bool) -> None:
    """Refuse a checkpoint that a run cannot begin with, before anything else is."""
    if not begins:
        if config.ckpt_path:
            return  # the weights of that are evaluated; `init_from` is of the settings that its run has begun with
        raise SettingsError(
            f"`init_from` is {config.init_from!r}, but only `fit` begins with the weights of another run. To evaluate "
            "them, give the file as `ckpt_path`."
        )
    if config.ckpt_path:
        raise SettingsError(
            f"`init_from` is {config.init_from!r} and `ckpt_path` is {config.ckpt_path!r}: the first begins a new run, "
            "the second continues one. Give only one of them."
        )
    if config.weights_only is not False:
        check_checkpoint(config.init_from, resume=False, argument="init_from")
