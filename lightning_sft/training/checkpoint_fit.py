"""Whether a checkpoint fits the module that loads it."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_sft.errors import SettingsError, and_more
from lightning_sft.model.builder import ModelBuilder


def check_adapters(hyper_parameters: Mapping[str, Any], builder: ModelBuilder) -> None:
    """Refuse a checkpoint with adapters of other settings; warn of adapters for another model.

    Args:
        hyper_parameters: Of the checkpoint.
        builder: Of the module.

    Raises:
        SettingsError: If the settings differ.
    """
    then = hyper_parameters.get("lora")
    if then != builder.lora:
        raise SettingsError(f"The checkpoint was trained with `lora` = {then}, but it is {builder.lora} here.")
    base = hyper_parameters.get("model")  # a name; or the model itself that `load_from_checkpoint` was given
    if builder.lora is not None and isinstance(base, str) and base != builder.base:
        rank_zero_warn(
            f"The checkpoint's adapters are of the model {base!r}, but `model` is {builder.base!r} here. On top of "
            "other weights they say nothing."
        )


def check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], strict: bool) -> None:
    """Refuse the weights of another model.

    Args:
        saved: The checkpoint's state dict.
        own: The module's.
        strict: Whether both have to hold the same names.

    Raises:
        SettingsError: If names or shapes differ; the message has the first difference.
    """
    misfits = [
        f"`{name}` is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    if strict:
        misfits += [f"`{name}` is missing there" for name in own if name not in saved]
        misfits += [f"`{name}` is there alone" for name in saved if name not in own]
    if misfits:
        raise SettingsError(
            f"The checkpoint is of another model: {misfits[0]}{and_more(misfits)}. "
            "Set `model` to the one that it was trained from."
        )


def check_optimizer(checkpoint: Mapping[str, Any], make_optimizer: Callable[[], Optimizer]) -> None:
    """Refuse to continue with another optimizer: its parameter groups would lack settings that it reads in each step.

    Args:
        checkpoint: The whole of it; without the state of an optimizer there is nothing to refuse.
        make_optimizer: Makes one as the run has it.

    Raises:
        SettingsError: Naming a setting that is missing.
    """
    for state in (checkpoint.get("optimizer_states") or ())[:1]:
        optimizer = make_optimizer()
        for then, now in zip(state.get("param_groups", ()), optimizer.param_groups, strict=False):
            if missing := sorted(now.keys() - then.keys()):
                raise SettingsError(
                    f"The checkpoint is of a run with another optimizer: it has no `{missing[0]}`, which this run's "
                    f"{type(optimizer).__name__} needs. Set `optimizer` to the one of that run."
                )
