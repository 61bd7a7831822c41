"""The weights of a checkpoint, without its optimizer; and runs that begin with them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import PreTrainedModel

from lightning_sft.model.builder import ModelBuilder
from lightning_sft.training.checkpoint_files import check_checkpoint
from lightning_sft.training.checkpoint_fit import check_adapters, check_weights
from lightning_sft.training.trained_weights import trained_names

_OF_MODEL = "model."  # what the names of its weights begin with


def read_checkpoint(path: Path, weights_only: bool = True, argument: str = "ckpt_path") -> dict[str, Any]:
    """A checkpoint with its weights (`state_dict`) on the CPU.

    Weights of a file are mapped, not read. Of a sharded model's folder only weights are read, not the optimizer.

    Args:
        path: The file, or the folder that a sharded model is saved to.
        weights_only: Refuse what could run code: every sharded checkpoint, and files that hold more than tensors and
            plain values.
        argument: The name of the setting, for messages.

    Raises:
        MissingFileError: There is no such file.
        SettingsError: It is no whole checkpoint, or could run code.
    """
    if weights_only or not path.exists():
        check_checkpoint(str(path), resume=False, argument=argument)
    if path.is_dir():
        return _read_folder(path)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    return checkpoint


def _read_folder(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path / "meta.pt", map_location="cpu", weights_only=False)
    reader = FileSystemReader(path)
    weights = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("state_dict.") and isinstance(stored, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # it warns of what it was told to do
        load(weights, storage_reader=reader, no_dist=True)
    return checkpoint | {"state_dict": {name.removeprefix("state_dict."): weights[name] for name in weights}}


@dataclass(frozen=True)
class InitialWeights:
    """The weights of an earlier run, which a new one begins with.

    Attributes:
        path: Of the checkpoint, as for `read_checkpoint`.
        weights_only: Likewise.
    """

    path: Path
    weights_only: bool = True

    def give_to(self, model: PreTrainedModel, builder: ModelBuilder) -> None:
        """Put them into a model.

        Args:
            model: Whole, with its adapters; changed in place.
            builder: That has made it.

        Raises:
            SettingsError: If the checkpoint cannot be read, or is of another model.
        """
        checkpoint = read_checkpoint(self.path, self.weights_only, "init_from")
        check_adapters(checkpoint.get("hyper_parameters", {}), builder)
        saved, own = checkpoint["state_dict"], {f"{_OF_MODEL}{name}": each for name, each in model.state_dict().items()}
        if builder.lora is not None:  # frozen weights are in no checkpoint
            trained = {f"{_OF_MODEL}{name}" for name in trained_names(model)}
            own = {name: weight for name, weight in own.items() if name in trained}
        check_weights({name: saved[name] for name in saved if name.startswith(_OF_MODEL)}, own, strict=True)
        weights = {name.removeprefix(_OF_MODEL): saved[name] for name in own}
        model.load_state_dict(weights, strict=builder.lora is None)
