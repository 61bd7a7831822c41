"""Checkpoints on disk: complete or not there at all, and looked at before anything is loaded from them."""

import errno
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.errors import MissingFileError, SettingsError, one_line, path_from_here
from lightning_sft.training.sharded_files import OF_WEIGHTS, check_shards

_PARTIAL = ".partial"


class CheckpointWriteError(SettingsError, OSError):
    """A checkpoint cannot be written."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, and takes its place only once everything is on the disk.

    Lightning's own writes to the system's temporary folder; killed while moving from there, it leaves half a file, and
    where it may not write it says nothing (pytorch-lightning#19970, #21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint to a file; to an address, such as `s3://bucket/last.ckpt`, as Lightning does.

        Raises:
            CheckpointWriteError: If the file cannot be written; what was there before is still there.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}{_PARTIAL}")
        try:
            with _explained(path), open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            take_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint from a file, or from an address."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        _check_is_whole(str(path), "ckpt_path")
        if Path(path).is_dir():
            raise SettingsError(
                f"`ckpt_path` is {str(path)!r}, the folder of a sharded model, but here each device holds the whole "
                "model. Set `trainer.strategy` to `ModelParallelStrategy` (`--config fsdp`), also for one device; or "
                "let `lightning-sft export` make a `model` of it."
            )
        return super().load_checkpoint(path, map_location, weights_only)


def use_own_files(trainer: L.Trainer) -> None:
    """Let a trainer read and write its checkpoints by `AtomicCheckpointIO`, unless somebody chose another way.

    Lightning's `AsyncCheckpointIO` then calls it in its thread.
    """
    strategy = trainer.strategy
    found = strategy.checkpoint_io
    if type(found) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif type(found) is AsyncCheckpointIO and type(found.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AsyncCheckpointIO(AtomicCheckpointIO())


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free
        reason = os.strerror(cause.errno) if cause is not None and cause.errno else str(error).splitlines()[0]
        raise CheckpointWriteError(
            cause.errno if cause is not None else errno.EIO,
            f"The checkpoint {path} cannot be written: {reason} ({free / 2**30:.2f} GiB free). The one before is still "
            "there. Make room, or choose another folder with `trainer.logger` or `trainer.default_root_dir`",
        ) from error


def take_place(partial: Path, path: Path) -> None:
    """Put something complete where others look for it, in one step that a crash cannot cut in half."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def put_folder_behind_link(partial: Path, folder: Path, link: Path) -> None:
    """Move a complete folder from `partial` to `folder`, let a link point to it, and remove the one it pointed to."""
    earlier = link.resolve() if link.is_symlink() else None
    if folder.resolve() == earlier:  # a run that has gone back to an earlier checkpoint comes to the same step
        folder = folder.with_name(f"{folder.name}_again")
    if folder.is_dir():  # saved by a run that was killed before it could move the link
        shutil.rmtree(folder)
    take_place(partial, folder)
    new_link = link.with_name(f".{link.name}{_PARTIAL}")
    new_link.unlink(missing_ok=True)
    new_link.symlink_to(folder.name)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    take_place(new_link, link)
    if earlier is not None and earlier != folder.resolve():
        shutil.rmtree(earlier, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Clear away what a killed run has left half-written."""
    for path in folder.glob(f".*{_PARTIAL}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def is_complete(path: Path) -> bool:
    """Whether there is a whole checkpoint: one file, or the folder that a sharded model is saved to."""
    if path.is_dir():
        return (path / ".metadata").is_file() and (path / "meta.pt").is_file()
    return path.is_file() and zipfile.is_zipfile(path)


def newest_checkpoint(runs: Path, fits: Callable[[Path], bool] = lambda run: True) -> Path | None:
    """The last checkpoint of the run in the folder `runs`, or of that run below it which saved one most recently.

    `fits` is asked whether the run in a folder may be taken. If there are several, it is said which one was.
    """
    found = [path for pattern in ("", "*/", "*/*/") for path in runs.glob(f"{pattern}checkpoints/last.ckpt")]
    found = [path for path in found if is_complete(path) and fits(path.parent.parent)]
    newest = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    if newest is not None and len(found) > 1:
        run = path_from_here(newest.parent.parent)
        rank_zero_info(
            f"Of {len(found):,} runs below {path_from_here(runs)}, {run} was saved last, and is taken. To take "
            "another, give its `config.yaml` as `--config`."
        )
    return newest


def check_checkpoint(path: str, resume: bool, argument: str = "ckpt_path") -> None:
    """Refuse a file or a sharded model's folder that Lightning could not load, or not without running code from it.

    With `resume` it must have all that a training needs to continue. Tensors are mapped, not read, so the size does not
    matter. `argument` is the name of the setting in messages.
    """
    came = f"`{argument}` is {path!r}"
    _check_is_whole(path, argument)
    try:
        checkpoint = _look_into_folder(Path(path)) if os.path.isdir(path) else _look_into_file(path)
    except pickle.UnpicklingError as error:
        raise SettingsError(
            f"{came}, which holds {_what(error)}, not only tensors and plain values. Loading it could run code, so it "
            "is not loaded. If you trust whoever made it, set `weights_only` to false."
        ) from None
    except Exception as error:
        raise SettingsError(f"{came}, which cannot be read: {one_line(error)} Take another one.") from error
    if not {"state_dict", "pytorch-lightning_version"} <= checkpoint:
        raise SettingsError(
            f"{came}, which is not a checkpoint of a run: it has no `state_dict` beside a Lightning version. To start "
            "from weights, set `model` to a folder that `save_pretrained` made."
        )
    if resume and not {"loops", "optimizer_states"} <= checkpoint:
        raise SettingsError(f"{came}, which has only weights. To continue training, use one with an optimizer state.")


def _check_is_whole(path: str, argument: str) -> None:
    """Refuse what is no checkpoint at first sight: neither a file of torch nor the folder of a sharded model."""
    came = f"`{argument}` is {path!r}"
    if not os.path.exists(path):
        raise MissingFileError(f"{came}, but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.")
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, ".metadata")):
            raise SettingsError(
                f"{came}, a folder without a checkpoint. Give the file itself, such as checkpoints/last.ckpt."
            )
    elif not zipfile.is_zipfile(path):
        raise SettingsError(
            f"{came}, which is not a complete checkpoint ({os.path.getsize(path)} bytes): it is truncated, or another "
            "kind of file. Use another one, such as the best."
        )


def _look_into_file(path: str) -> set[str]:
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return set(checkpoint) if isinstance(checkpoint, dict) else set()


def _look_into_folder(path: Path) -> set[str]:
    """What would be found in a file, of which Lightning writes the larger parts into shards instead."""
    stored = check_shards(path)
    parts = {"state_dict": OF_WEIGHTS, "optimizer_states": "optimizer_"}
    sharded = {part for part, beginning in parts.items() if any(name.startswith(beginning) for name in stored)}
    return sharded | _look_into_file(str(path / "meta.pt"))


def _what(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"`{found[1]}`" if found else "objects"
