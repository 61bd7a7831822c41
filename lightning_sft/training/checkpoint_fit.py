"""Whether a checkpoint fits the module that loads it."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sft.errors import SettingsError, and_more
from lightning_sft.hub import is_commit
from lightning_sft.model.builder import ModelBuilder
from lightning_sft.training.objective import Objective
from lightning_sft.training.stored_settings import HYPER_PARAMETERS


def check_adapters(hyper_parameters: Mapping[str, Any], builder: ModelBuilder) -> None:
    """Refuse a checkpoint with adapters of other settings; warn of adapters for another model."""
    then = hyper_parameters.get("lora")
    if then != builder.lora:
        raise SettingsError(
            f"The checkpoint was trained with `lora` = {then}, but it is {builder.lora} here. Set it to the former."
        )
    base = hyper_parameters.get("model")  # a name; or the model itself that `load_from_checkpoint` was given
    if builder.lora is not None and isinstance(base, str) and base != builder.base:
        rank_zero_warn(
            f"The checkpoint's adapters are of the model {base!r}, but `model` is {builder.base!r} here. With other "
            "weights they have no meaning."
        )
        return
    commit = (hyper_parameters.get("model_kwargs") or {}).get("revision")
    if isinstance(base, str) and is_commit(commit) and is_commit(builder.commit) and commit != builder.commit:
        rank_zero_warn(
            f"The checkpoint's adapters are of commit {commit} of {base!r}, but `model` is its commit {builder.commit} "
            f"here. If its weights have changed, they have no meaning. Set `model` to '{base}@{commit}'."
        )


def check_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], strict: bool) -> None:
    """Refuse the weights of another model: other shapes; if `strict`, also other names."""
    misfits = [
        f"`{name}` is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own
        if name in saved and saved[name].shape != own[name].shape
    ]
    if strict:
        misfits += [f"`{name}` is missing there" for name in own if name not in saved]
        misfits += [f"`{name}` exists only there" for name in saved if name not in own]
    if misfits:
        raise SettingsError(
            f"The checkpoint is of another model: {misfits[0]}{and_more(misfits)}. "
            "Set `model` to the one that it was trained from."
        )


def check_same_run(
    checkpoint: Mapping[str, Any], objective: Objective, patterns: Mapping[str, Sequence[str]], base_model: str | None
) -> None:
    """Refuse to continue a run with another loss, other parameters trained, or in the name of another model.

    The checkpoint of a run with adapters may be continued on another model: `check_adapters` warns of that.
    """
    then = checkpoint.get(HYPER_PARAMETERS, {})
    for name, now in objective.settings().items():
        if then.get(name, now) != now:
            raise SettingsError(
                f"The checkpoint was made with `{name}` = {then[name]}, now it is {now}: the run would not continue "
                f"with the same loss. Use {then[name]}, or begin a new run with its weights (`--init_from`)."
            )
    _check_same_parameters(then, patterns)
    earlier = checkpoint.get("model_card", {}).get("base_model")
    has_adapters = then.get("lora") is not None
    if earlier and base_model and not has_adapters and PurePath(earlier).name != PurePath(base_model).name:
        raise SettingsError(
            f"The checkpoint was trained from the model {earlier!r}, but `model` is {base_model!r} here, whose weights "
            f"would not be used. Set `model` to {earlier!r}."
        )


def _check_same_parameters(settings: Mapping[str, Any], patterns: Mapping[str, Sequence[str]]) -> None:
    """Refuse to train other parameters, or other groups of them: each would be given the optimizer state of another."""
    for name, now in patterns.items():
        given = settings.get(name) or []
        then = [each["pattern"] if isinstance(each, Mapping) else each for each in given]
        if then != list(now):
            raise SettingsError(
                f"The checkpoint was made with the patterns {then} in `{name}`, now they are {list(now)}, but the "
                "checkpoint holds the optimizer's state of each parameter. Use the former, or begin a new run with its "
                "weights (`--init_from`)."
            )
