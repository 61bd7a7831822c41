"""The weights of a checkpoint, without its optimizer; and runs that begin with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_sft.model.builder import ModelBuilder
from lightning_sft.training.checkpoint_files import check_checkpoint
from lightning_sft.training.checkpoint_fit import check_adapters, check_weights
from lightning_sft.training.sharded_files import read_weights
from lightning_sft.training.stored_settings import HYPER_PARAMETERS
from lightning_sft.training.trained_weights import trained_names


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


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint, by their names in the model rather than in its module."""
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    return {name.removeprefix("model."): weights[name] for name in weights if name.startswith("model.")}


@dataclass(frozen=True)
class InitialWeights:
    """The weights of an earlier run, which a new one begins with; the arguments are those of `read_checkpoint`."""

    path: Path
    weights_only: bool = True

    def give_to(self, model: PreTrainedModel, builder: ModelBuilder) -> None:
        """Put them into a whole model with its adapters, which `builder` has made."""
        checkpoint = read_checkpoint(self.path, self.weights_only, "init_from")
        check_adapters(checkpoint.get(HYPER_PARAMETERS, {}), builder)
        saved, own = model_weights(checkpoint), model.state_dict()
        if builder.lora is not None:  # frozen weights are in no checkpoint
            trained = trained_names(model)
            own = {name: weight for name, weight in own.items() if name in trained}
        check_weights(saved, own, strict=True)
        model.load_state_dict(saved, strict=builder.lora is None)
