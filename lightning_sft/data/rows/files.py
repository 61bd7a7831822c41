"""Files of rows: found by name or pattern, on this machine or wherever `fsspec` opens them, compressed or not."""

import bz2
import glob
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DownloadConfig, DownloadManager
from fsspec.core import url_to_fs

from lightning_sft.errors import MissingFileError, SettingsError, one_line

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_DECOMPRESSED: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    ".bz2": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    ".xz": lambda file: cast(BinaryIO, lzma.LZMAFile(file)),  # noqa: SIM115
    # By Arrow, which `datasets` brings: Python reads this from 3.14 on.
    ".zst": lambda file: cast(BinaryIO, io.BufferedReader(pa.CompressedInputStream(file, "zstd"))),
}
_WEB = ("http://", "https://")
_KINDS = f"a file ending in {', '.join(SUFFIXES)}, perhaps with {', '.join(_DECOMPRESSED)} after it"


def is_remote(name: str) -> bool:
    """Whether a name is an address that `fsspec` opens, such as `s3://bucket/rows.jsonl`."""
    return "://" in name


@dataclass(frozen=True)
class FileKind:
    """What a file is by its name: one of `SUFFIXES`, and its compression, such as `.gz`; each empty if it has none."""

    suffix: str
    compression: str = ""

    @classmethod
    def of(cls, path: str) -> "FileKind":
        """The kind of the file at a path or address."""
        name = PurePosixPath(urlsplit(path).path if path.startswith(_WEB) else path)
        compression = name.suffix if name.suffix in _DECOMPRESSED else ""
        suffix = PurePosixPath(name.stem).suffix if compression else name.suffix
        return cls(suffix if suffix in SUFFIXES else "", compression)

    @contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """A file of this kind for reading, decompressed."""
        with fsspec.open(path, "rb") if is_remote(path) else open(path, "rb") as file:
            if not self.compression:
                yield file
                return
            with _DECOMPRESSED[self.compression](file) as decompressed:
                yield decompressed


def local_copy(path: str) -> str:
    """The path of a file itself, or of a copy on this machine, which `datasets` makes and keeps.

    A file is copied anew if it has changed: if it is of another commit of a hub's repository, or has another ETag than
    the copy. One without an ETag is copied each time, since nobody knows whether it has changed.
    """
    if not is_remote(path):
        return path
    filesystem, inner = url_to_fs(path)
    is_in_repository = path.startswith("hf://") and not path.startswith("hf://buckets/")
    tells_changes = is_in_repository or not {"ETag", "etag"}.isdisjoint(filesystem.info(inner))
    return str(DownloadManager(download_config=DownloadConfig(force_download=not tells_changes)).download(path))


def unreadable(argument: str, path: str, error: BaseException) -> SettingsError:
    """What a user is told of a file, given by an argument, that cannot be read."""
    words = one_line(error.__cause__ or error)
    if words.startswith("Offline mode is enabled"):  # by `datasets`, of addresses that are none of a hub's, too
        words += ". Unset the environment variable `HF_HUB_OFFLINE`, or give a copy on this machine."
    return SettingsError(f"`{argument}`: cannot read {path}: {words}")


def check_parquet(path: str) -> None:
    """Refuse a Parquet file that `datasets` would refuse in words that say nothing, or later; its end alone is read."""
    with FileKind.of(path).open(path) as file:
        metadata = pq.read_metadata(file)
    columns = metadata.schema.to_arrow_schema().names
    if twice := {column for column in columns if columns.count(column) > 1}:
        raise SettingsError(f"it has the column {min(twice)!r} more than once. Rename all but one.")
    if not metadata.num_rows:
        raise SettingsError("it has no rows.")


def find_files(name: str, argument: str) -> list[str]:
    """The files that a name means if it is a path, perhaps with `~`, an address for `fsspec`, or a pattern; or none."""
    if not name.strip():
        raise SettingsError(f"`{argument}` is {name!r}; expected a file or the name of a data set.")
    paths = _find_remote(name, argument) if is_remote(name) else _find_local(os.path.expanduser(name), name, argument)
    if paths is None:
        return []
    if not paths:
        raise MissingFileError(f"`{argument}` is {name!r}, but there is no such file.")
    for path in paths:
        kind = FileKind.of(path)
        if not kind.suffix:
            raise SettingsError(f"`{argument}` is {path!r}; expected {_KINDS}.")
        if kind.suffix == ".parquet" and kind.compression:
            raise SettingsError(f"`{argument}` is {path!r}, but Parquet is compressed within the file. Unpack it.")
    return paths


def _find_local(path: str, name: str, argument: str) -> list[str] | None:
    """The files behind a path or a pattern; None if it is neither."""
    inner, *options = path.split(":", 2)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path) or (os.path.isdir(inner) and not FileKind.of(path).suffix):
        return None  # a data set in a folder, whose name may look like that of a file or like a pattern
    if options and FileKind.of(inner).suffix:
        use = name.split(":", 1)[0]
        raise SettingsError(f"`{argument}` is {name!r}, but a file has neither configuration nor split. Use {use!r}.")
    if FileKind.of(path).suffix or glob.has_magic(inner):
        return sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    return None


def _find_remote(name: str, argument: str) -> list[str] | None:
    """The files behind an address; None if it has no kind that a file has, and is no pattern."""
    is_web = name.startswith(_WEB)  # where a question mark begins the query
    is_pattern = "*" in name if is_web else glob.has_magic(name)
    if not is_pattern and not FileKind.of(name).suffix:
        return None
    try:
        filesystem, path = url_to_fs(name)
        if is_pattern:
            paths = sorted(filter(filesystem.isfile, filesystem.glob(path)))
            return [filesystem.unstrip_protocol(path) for path in paths]
        filesystem.info(path)
        return [name]
    except Exception as error:
        reason = error if isinstance(error, ImportError) else error.__cause__ or error
        if isinstance(reason, FileNotFoundError):
            return []
        raise SettingsError(
            f"`{argument}` is {name!r}, which cannot be reached: {type(reason).__name__}: {one_line(reason)}"
        ) from error
