"""What a trainer would be, read from its settings: there is none where a run is only estimated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_sft.errors import SettingsError
from lightning_sft.loops.run_length import limited_steps
from lightning_sft.model.precision import Precision
from lightning_sft.training.trainer_checks import check_strategy


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a trainer that memory and time depend on.

    Attributes:
        on_cuda: Whether it trains on CUDA devices.
        num_devices: Over all nodes.
        is_sharded: Whether they share one model rather than hold a copy each.
        precision: Of weights and products.
        max_steps: Optimizer steps after which it stops, if that is set.
        max_epochs: Epochs after which it stops, if that is set.
        limit: Optimizer steps of each epoch as an integer, or the share of them that it takes as a float.
    """

    on_cuda: bool
    num_devices: int
    is_sharded: bool
    precision: Precision
    max_steps: int | None
    max_epochs: int | None
    limit: int | float = 1.0

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> "TrainerSettings":
        """Read the arguments of `Trainer` as a configuration has them; those that are missing have its defaults.

        Refused are a precision that is not known, or whose memory cannot be estimated, and a strategy that cannot train
        here.
        """
        precision, on_cuda = Precision.of(trainer.get("precision")), _is_cuda(trainer)
        if precision.word.startswith("transformer-engine"):
            raise SettingsError(f"`precision` is '{precision}', whose copies of weights in 8 bits are not estimated.")
        strategy = trainer.get("strategy") or "auto"
        name = strategy if isinstance(strategy, str) else str(strategy["class_path"])
        check_strategy(name)
        return cls(
            on_cuda=on_cuda,
            num_devices=_num_devices(trainer, on_cuda),
            is_sharded="modelparallel" in name.replace("_", "").lower(),
            precision=precision,
            max_steps=_limit(trainer.get("max_steps")),
            max_epochs=_limit(trainer.get("max_epochs")),
            limit=trainer.get("overfit_batches") or trainer.get("limit_train_batches") or 1.0,
        )

    def num_steps(self, steps_per_epoch: int) -> int | None:
        """Optimizer steps of the run, if so many go once through the data; None if only time ends it."""
        in_epoch = limited_steps(self.limit, steps_per_epoch)
        limits = [self.max_steps, None if self.max_epochs is None else self.max_epochs * in_epoch]
        return min((limit for limit in limits if limit is not None), default=None)


def _is_cuda(trainer: Mapping[str, Any]) -> bool:
    accelerator = str(trainer.get("accelerator") or "auto")
    return torch.cuda.is_available() if accelerator == "auto" else accelerator in ("gpu", "cuda")


def _num_devices(trainer: Mapping[str, Any], on_cuda: bool) -> int:
    """Over all nodes; `auto` and -1 are those of this machine."""
    devices = trainer.get("devices") or "auto"
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part]
    if devices in ("auto", "-1", -1):
        devices = max(torch.cuda.device_count(), 1) if on_cuda else 1
    return (len(devices) if isinstance(devices, list) else int(devices)) * int(trainer.get("num_nodes") or 1)


def _limit(value: int | None) -> int | None:
    return None if value == -1 else value
