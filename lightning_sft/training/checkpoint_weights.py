"""The weights of a checkpoint, without its optimizer; and runs that begin with them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_sft.model.builder import ModelBuilder
from lightning_sft.training.checkpoint_files import check_checkpoint
from lightning_sft.training.checkpoint_fit import check_adapters, check_weights
from lightning_sft.training.sharded_files import read_weights
from lightning_sft.training.stored_settings import HYPER_PARAMETERS
from lightning_sft.training.trained_weights import trained_names

OF_MODEL = "model."  # what the names of its weights begin with in a checkpoint


def read_checkpoint(path: Path, weights_only: bool = True, argument: str = "ckpt_path") -> dict[str, Any]:
    """A checkpoint with its weights (`state_dict`) on the CPU.

    Weights of a file are mapped, not read. Of a sharded model's folder only weights are read, not the optimizer. With
    `weights_only` more than tensors and plain values is refused, as it could run code. `argument` is the name of the
    setting in messages.
    """
    if weights_only or not path.exists():
        check_checkpoint(str(path), resume=False, argument=argument)
    file = path / "meta.pt" if path.is_dir() else path
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
    if path.is_dir():
        checkpoint["state_dict"] = read_weights(path, weights_only)
    return checkpoint


@dataclass(frozen=True)
class InitialWeights:
    """The weights of an earlier run, which a new one begins with; the arguments are those of `read_checkpoint`."""

    path: Path
    weights_only: bool = True

    def give_to(self, model: PreTrainedModel, builder: ModelBuilder) -> None:
        """Put them into a whole model with its adapters, which `builder` has made."""
        checkpoint = read_checkpoint(self.path, self.weights_only, "init_from")
        check_adapters(checkpoint.get(HYPER_PARAMETERS, {}), builder)
        saved, own = checkpoint["state_dict"], {f"{OF_MODEL}{name}": each for name, each in model.state_dict().items()}
        if builder.lora is not None:  # frozen weights are in no checkpoint
            trained = {f"{OF_MODEL}{name}" for name in trained_names(model)}
            own = {name: weight for name, weight in own.items() if name in trained}
        check_weights({name: saved[name] for name in saved if name.startswith(OF_MODEL)}, own, strict=True)
        weights = {name.removeprefix(OF_MODEL): saved[name] for name in own}
        model.load_state_dict(weights, strict=builder.lora is None)
