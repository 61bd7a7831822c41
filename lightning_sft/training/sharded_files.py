"""The folder that a sharded model is saved to, read without running code that may be in it.

Torch's own reader unpickles such a folder's `.metadata`, which says what is where, and the plain values in its shards,
such as settings of the optimizer, whoever has written them. Tensors it reads safely.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

OF_WEIGHTS = "state_dict."  # what the names of a folder's weights begin with

# What torch writes into `.metadata` beside numbers and words. Called, none of it does more than hold what it is given.
_OF_METADATA = (
    *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
    *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
_IN_METADATA = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch.distributed.checkpoint.metadata", name) for name in _OF_METADATA),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows nothing but what torch writes."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # where Python 3.13 says that paths are
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _IN_METADATA:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not what torch writes into `.metadata`")
        return super().find_class(module, name)


class _SafeReader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            try:
                metadata = _MetadataUnpickler(file).load()
            except pickle.UnpicklingError as error:
                if "GLOBAL" in str(error):
                    raise
                raise EOFError("`.metadata` is cut short, or something else.") from error
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"`.metadata` is of type {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafePlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def check_shards(folder: Path) -> set[str]:
    """Read all of a folder but its tensors, safely: what then unpickles it without care runs no code.

    Returns:
        The names of all that is in it.

    Raises:
        pickle.UnpicklingError: If it holds something other than tensors and plain values.
        EOFError: If a file of it is missing or cut short, or a part of a tensor is in none.
    """
    reader = _SafeReader(folder)
    metadata = reader.read_metadata()
    _check_complete(folder, metadata)
    stored = metadata.state_dict_metadata
    values = {name: None for name, kind in stored.items() if isinstance(kind, BytesStorageMetadata)}
    _load(values, reader, _SafePlanner(flatten_state_dict=False))
    return set(stored)


def _check_complete(folder: Path, metadata: Metadata) -> None:
    """A copy can lack what another machine has written; found out while all processes load, it ends them in a list."""
    ends: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        ends[part.relative_path] = max(part.offset + part.length, ends.get(part.relative_path, 0))
    for name, end in ends.items():
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise EOFError(f"its file {name} is missing.")
        if file.stat().st_size < end:
            raise EOFError(f"its file {name} is cut short ({file.stat().st_size} bytes of {end}).")
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            continue
        if sum(chunk.sizes.numel() for chunk in stored.chunks) != stored.size.numel():
            raise EOFError(f"a part of {name} is missing.")


def read_weights(folder: Path, weights_only: bool) -> dict[str, torch.Tensor]:
    """The weights in a folder, whole, on the CPU, by their names in the module.

    With `weights_only` a folder that could run code is refused.

    Raises:
        pickle.UnpicklingError: If `.metadata` holds something else than torch writes into it.
    """
    reader = _SafeReader(folder) if weights_only else FileSystemReader(folder)
    weights = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(OF_WEIGHTS) and isinstance(stored, TensorStorageMetadata)
    }
    _load(weights, reader, _SafePlanner())
    return {name.removeprefix(OF_WEIGHTS): weights[name] for name in weights}


def _load(values: dict[str, Any], reader: FileSystemReader, planner: DefaultLoadPlanner) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # it warns of what it was told to do
        try:
            load(values, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:  # which would pass by whoever expects an `Exception`
            raise next(iter(error.failures.values()))[0] from None
