"""Checkpoints on disk: complete or not there at all."""

import errno
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

_PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, and takes its place only once everything is on the disk.

    Lightning's own writes to the system's temporary folder; killed while moving from there, it leaves half a file, and
    where it may not write it says nothing (pytorch-lightning#19970, #21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint to a file.

        Raises:
            OSError: If the file cannot be written; what was there before is still there.
        """
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
        raise OSError(
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
    """Give a complete folder its name, let a link point to it, and remove the folder that it pointed to before."""
    earlier = link.resolve() if link.is_symlink() else None
    if folder.is_dir():  # saved by a run that was killed before it could move the link
        shutil.rmtree(partial)
    else:
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


def newest_checkpoint(runs: Path) -> Path | None:
    """The last checkpoint of the run in a folder, or of that run below it which saved one most recently."""
    found = [path for pattern in ("", "*/", "*/*/") for path in runs.glob(f"{pattern}checkpoints/last.ckpt")]
    return max(filter(is_complete, found), key=lambda path: path.stat().st_mtime_ns, default=None)
