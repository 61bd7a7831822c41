"""Data sets by name: of a hub, of a folder of files, or as `save_to_disk` of `datasets` has written them."""

import hashlib
import os
from pathlib import Path
from typing import Literal, overload

from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, concatenate_datasets, load_dataset_builder
from datasets import config as datasets_config
from datasets import load_from_disk as load_saved
from datasets.fingerprint import Hasher
from datasets.packaged_modules.cache.cache import Cache
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_sft.data.rows.files import SUFFIXES, is_remote
from lightning_sft.errors import SettingsError, one_line, shorten
from lightning_sft.hub import commit_of, split_revision


@overload
def load_named(name: str, argument: str, streaming: Literal[False] = False) -> Dataset: ...
@overload
def load_named(name: str, argument: str, streaming: Literal[True]) -> IterableDataset: ...
def load_named(name: str, argument: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Load a data set by its name, as `open_sources` takes it; with `streaming` it is read while it is used."""
    try:
        if (found := _saved_folder(name)) is not None:
            folder, split = found
            saved = _part(load_saved(folder, keep_in_memory=False), split)
            return saved.to_iterable_dataset() if streaming else saved
        if is_remote(name):
            raise SettingsError(
                "a URL must lead to a file, a pattern of files, or a folder written by `save_to_disk`. A hub data set "
                "is given by its name, such as `user/set`."
            )
        whole = os.path.expanduser(name)
        path, *options = [whole] if os.path.isdir(whole) else whole.split(":", 2)
        config, split = [*options, None, None][:2]
        path, revision = split_revision(path)
        builder = load_dataset_builder(path, config or None, revision=revision)
        if isinstance(builder, Cache):
            builder = _cached(builder, path, revision)
        if streaming:
            return builder.as_streaming_dataset(split or "train")
        builder.download_and_prepare()
        return builder.as_dataset(split or "train")
    except Exception as error:
        words = one_line(error.__cause__ or error)
        words = words if isinstance(error, SettingsError) else f"{type(error).__name__}: {words}"
        raise SettingsError(
            f"`{argument}` is {name!r}: neither a file ({', '.join(SUFFIXES)}) nor a data set that can be loaded: "
            f"{words}"
        ) from error


def _cached(builder: Cache, path: str, revision: str | None) -> Cache:
    """What is in the cache of the revision that is asked for.

    If the hub cannot be reached, `datasets` takes whatever it has cached of the data set last, whichever revision it is
    of.
    """
    commit = commit_of(path, revision, "dataset")
    if builder.hash == commit or (revision is None and commit is None):
        return builder
    if commit is None or not Path(builder.cache_dir).with_name(commit).is_dir():
        raise SettingsError(
            f"the hub cannot be reached, and the cache has commit {builder.hash} of it, not "
            f"{revision or 'the latest'}. To use that, give the name as '{path}@{builder.hash}'."
        )
    return Cache(repo_id=path, dataset_name=builder.dataset_name, config_name=builder.config.name, hash=commit)


def _saved_folder(name: str) -> tuple[str, str | None] | None:
    """The folder that `save_to_disk` has written, and the split that is asked for; None if it is no such folder."""
    folder, _, split = name.rpartition("::") if "::" in name else (name, "", None)
    filesystem, path = url_to_fs(folder) if is_remote(folder) else (LocalFileSystem(), os.path.expanduser(folder))
    names = (datasets_config.DATASET_STATE_JSON_FILENAME, datasets_config.DATASETDICT_JSON_FILENAME)
    if not any(filesystem.isfile(f"{path}/{each}") for each in names):
        return None
    return filesystem.unstrip_protocol(path) if is_remote(folder) else path, split


def _part(saved: Dataset | DatasetDict, split: str | None) -> Dataset:
    """A split of what was saved, or a part of one, such as `train[:10%]`; its content identifies it."""
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    known = {str(name): len(rows) for name, rows in splits.items()}
    try:
        ranges = ReadInstruction.from_spec(split or "train").to_absolute(known)
    except ValueError:
        expected = shorten(list(known), 200)
        raise SettingsError(f"it has no split {split or 'train'!r}, expected one of {expected}.") from None
    # Of a range without numbers `datasets` looks at the first one.
    parts = [splits[each.splitname].select(range(each.from_, each.to) or []) for each in ranges]
    hasher = hashlib.blake2b()
    for part in parts:
        for file in part.cache_files:
            with open(file["filename"], "rb") as content:
                hasher.update(hashlib.file_digest(content, "blake2b").digest())
    rows = (concatenate_datasets(parts) if len(parts) > 1 else parts[0]).with_format(None)
    rows._fingerprint = Hasher.hash([hasher.hexdigest(), split, len(rows)])
    return rows
