"""Parameters chosen by patterns that their names match."""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from lightning_sft.checks import check_type
from lightning_sft.errors import SettingsError


def check_patterns(argument: str, patterns: Sequence[str] | None) -> None:
    """Refuse what is no list of regular expressions."""
    check_type(argument, patterns, (list, tuple), "a list of patterns", optional=True)
    for pattern in patterns or ():
        check_type(argument, pattern, str, "a list of patterns")
        try:
            re.compile(pattern)
        except re.error as error:
            raise SettingsError(f"`{argument}` has {pattern!r}, which is not a regular expression: {error}.") from error


def matching(argument: str, pattern: str, parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    """The parameters with a name in which the pattern is found, once each; refused if there are none.

    `argument` is the setting that has the pattern. A parameter that is shared has several names.
    """
    known = list(parameters)
    found = {weight: None for name, weight in known if re.search(pattern, name)}
    if not found:
        names = [name for name, _ in known]
        raise SettingsError(
            f"`{argument}` has {pattern!r}, which matches no name of a parameter. Names are, for example, "
            f"{', '.join(names[:3])} and {', '.join(names[-2:])}."
        )
    return list(found)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train no parameter whose name a pattern matches; refused if that is none, or all that there are."""
    for pattern in patterns:
        for weight in matching("freeze", pattern, model.named_parameters(remove_duplicate=False)):
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise SettingsError(f"`freeze` is {list(patterns)}, which leaves nothing to train. Leave out a pattern.")
