"""Steps of an optimizer that are tried out on copies of small parameters before it takes its own."""

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_sft.errors import SettingsError, one_line

IMPLEMENTATION = ("foreach", "fused")  # how a step is computed, not what


def kind_of(optimizer: Optimizer) -> str:
    """Module and name of an optimizer's class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def missing_state(optimizer: Optimizer) -> str | None:
    """The state that an optimizer needs for a step and that the checkpoint it was restored from lacks; None if none."""
    for group in optimizer.param_groups:
        known = [weight for weight in group["params"] if optimizer.state.get(weight)]
        if not known:
            continue
        weight = min(known, key=lambda each: each.numel())
        tried = _copy(_local(weight))
        state = {
            name: _local(value).clone() if isinstance(value, Tensor) else value
            for name, value in optimizer.state[weight].items()
        }
        plain = {name: False for name in IMPLEMENTATION if name in group}
        try:
            _trial(optimizer, [group | {"params": [tried]} | plain], {tried: state}).step()
        except KeyError as error:
            return str(error)
    return None


def check_takes_shards(optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot step where devices share the weights; all of them try it together."""
    groups = []
    for group in optimizer.param_groups:
        sharded = [weight for weight in group["params"] if isinstance(weight, DTensor)]
        smallest = {weight.ndim: weight for weight in sorted(sharded, key=lambda each: -each.numel())}
        groups.append(group | {"params": [_copy(weight) for weight in smallest.values()]})
    if not any(group["params"] for group in groups):
        return
    try:
        _trial(optimizer, groups, {}).step()
    except Exception as error:
        raise SettingsError(
            f"`optimizer` is {kind_of(optimizer)}, which cannot train sharded weights: {one_line(error, 200)} Use "
            "another one, such as torch.optim.AdamW, or `trainer.strategy` 'ddp'."
        ) from error


def _copy(weight: Tensor) -> nn.Parameter:
    """A parameter of the same values whose gradient is zero."""
    copied = nn.Parameter(weight.detach().clone())
    copied.grad = torch.zeros_like(copied)
    return copied


def _trial(optimizer: Optimizer, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> Optimizer:
    """An optimizer of other parameters that is like this one in all else.

    `copy.copy` would leave out all that an optimizer keeps beside groups and states, as those of bitsandbytes do.
    """
    trial: Optimizer = object.__new__(type(optimizer))
    own: dict[str, Any] = {"param_groups": groups, "state": defaultdict(dict, state)}
    own |= {"_optimizer_step_pre_hooks": OrderedDict(), "_optimizer_step_post_hooks": OrderedDict()}
    trial.__dict__.update(vars(optimizer) | own)
    trial.__dict__.pop("step", None)  # by which a schedule counts the optimizer's own steps
    return trial


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
