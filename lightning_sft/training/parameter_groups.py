"""`ParameterGroups`: learning rate, weight decay and the like for some parameters, by their names."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from lightning_sft.checks import check_type
from lightning_sft.errors import SettingsError, and_more, one_line, shorten
from lightning_sft.model.parameter_names import check_patterns, matching

Places = Sequence[Sequence[int]]  # of the parameters of each group, in the module


class ParameterGroups:
    """Settings of the optimizer for some parameters.

    Args:
        groups: Each a mapping of `pattern`, a regular expression, and settings of the optimizer. A parameter belongs to
            the first group whose pattern its name matches. None: all parameters have the optimizer's own settings.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]] | None) -> None:
        check_type("parameter_groups", groups, (list, tuple), "a list of mappings", optional=True)
        self._groups = [dict(group) if isinstance(group, Mapping) else group for group in groups or ()]
        for group in self._groups:
            check_type("parameter_groups", group, dict, "a list of mappings")
            if "pattern" not in group or len(group) < 2 or "params" in group:
                raise SettingsError(
                    f"`parameter_groups` has {shorten(group, 200)}, expected a `pattern` of names and settings of the "
                    "optimizer, such as {pattern: 'bias$', weight_decay: 0.0}."
                )
        check_patterns("parameter_groups", self.patterns)

    @property
    def patterns(self) -> list[str]:
        """Of the groups, in their order."""
        return [group["pattern"] for group in self._groups]

    def make_optimizer(self, factory: OptimizerCallable, module: nn.Module) -> Optimizer:
        """The optimizer of all trained parameters, as the factory makes it of them or of groups.

        Patterns are matched with the names of parameters in `module.model`. Refused are patterns that match no trained
        parameter, settings that the optimizer does not have, and optimizers that need another training loop.
        """
        try:
            optimizer = self._make(factory, module)
        except SettingsError:
            raise
        except Exception as error:
            raise SettingsError(
                f"`optimizer` cannot be made of the model's parameters: {one_line(error, 300).rstrip('.')}. Choose "
                "another, such as AdamW, or `freeze` those that it cannot train."
            ) from error
        _check(optimizer)
        return optimizer

    def _make(self, factory: OptimizerCallable, module: nn.Module) -> Optimizer:
        named = module.named_parameters(remove_duplicate=False)
        trained = [(name.removeprefix("model."), weight) for name, weight in named if weight.requires_grad]
        rest = dict.fromkeys(weight for _, weight in trained)
        if not self._groups:
            return factory(iter(rest))
        groups = []
        for group in self._groups:
            found = [weight for weight in matching("parameter_groups", group["pattern"], trained) if weight in rest]
            if not found:
                raise SettingsError(
                    f"`parameter_groups` has {group['pattern']!r}, but all that it matches belongs to a pattern before "
                    "it. Put it first, or leave it out."
                )
            groups.append({name: value for name, value in group.items() if name != "pattern"} | {"params": found})
            rest = {weight: None for weight in rest if weight not in set(found)}
        optimizer = factory([{"params": list(rest)}, *groups] if rest else groups)
        for group in self._groups:
            if unknown := sorted(group.keys() - optimizer.defaults.keys() - {"pattern"}):
                raise SettingsError(
                    f"`parameter_groups` sets `{unknown[0]}`, which {type(optimizer).__name__} does not have. It has "
                    f"{', '.join(sorted(optimizer.defaults))}."
                )
        return optimizer


def _check(optimizer: Optimizer) -> None:
    """Refuse an optimizer that needs more of a training loop than gradients and the learning rate of a schedule."""
    check_type("optimizer", optimizer, Optimizer, "a function that makes an optimizer")
    name = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise SettingsError(
            f"`optimizer` is {name}, which computes loss and gradients several times a step. Here they are computed "
            "once, before the optimizer's step. Choose another, such as AdamW."
        )
    if hasattr(optimizer, "eval"):
        raise SettingsError(
            f"`optimizer` is {name}, which trains other weights than are to be evaluated and saved (it has `eval`). "
            "Validation, generations, checkpoints and exports would have the wrong ones. Choose another, such as AdamW."
        )
    if any(group.get("lr", 0.0) is None for group in optimizer.param_groups):
        raise SettingsError(
            f"`optimizer` is {name} without a learning rate, which `lr_scheduler` is to multiply. Give it an `lr`; "
            "Adafactor of `transformers` then also needs `relative_step` and `scale_parameter` to be false."
        )


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def number_as_in_module(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> None:
    """Renumber the parameters in a state dict of an optimizer by their places in a module, which a sharded model needs.

    Torch numbers them in the order of the optimizer's groups, without frozen ones. A model that is not sharded is
    restored by that order, whatever the numbers are. The state dict of an optimizer with parameters or states of its
    own, such as copies in float32, stays as it is.
    """
    places = {parameter: place for place, parameter in enumerate(module.parameters())}
    if "state" not in state or not places.keys() >= set(parameters_of(optimizer)):
        return
    saved = [number for group in state["param_groups"] for number in group["params"]]
    numbers = {then: places[weight] for then, weight in zip(saved, parameters_of(optimizer), strict=True)}
    state["state"] = {numbers[then]: values for then, values in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [numbers[then] for then in group["params"]]


def check_same_parameters(saved: Places, optimizer: Optimizer, module: nn.Module) -> None:
    """Refuse to restore an optimizer of other parameters: torch gives the states to parameters by their order alone.

    Args:
        saved: Those of a checkpoint, as `number_as_in_module` numbers them; empty if it does not say.
        optimizer: Made anew. Of one with parameters of its own nothing is known.
        module: Whose parameters it trains.
    """
    names = {parameter: name.removeprefix("model.") for name, parameter in module.named_parameters()}
    if not saved or not names.keys() >= set(parameters_of(optimizer)):
        return
    in_order = [*names.values(), *["?"] * max(chain(*saved), default=0)]
    then = [[in_order[place] for place in group] for group in saved]
    now = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if then != now:
        here = set(chain(*now))
        differing = sorted(here ^ set(chain(*then)))
        what = "the same parameters in other groups"
        if differing:
            where = "here" if differing[0] in here else "there"
            what = f"other parameters: `{differing[0]}` is trained only {where}{and_more(differing)}"
        raise SettingsError(
            f"The checkpoint is of a run that trained {what}. Freeze the same ones (`freeze`, `requires_grad`), in the "
            "same groups, or begin a new run with its weights (`--init_from`)."
        )
