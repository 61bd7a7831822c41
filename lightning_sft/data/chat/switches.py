"""Switches of messages, which say whether a turn of the assistant is learnt."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from lightning_sft.errors import SettingsError, shorten

_SWITCHES = ("weight", "train", "trainable", "training", "loss", "loss_mask", "loss_weight", "loss_scale")
_WHOLE = (
    "but a turn is learnt as a whole or not at all. Remove it, or set `train` to false for a turn that is not to be "
    "learnt."
)


def take_switches(turn: str, role: str, message: dict[str, Any]) -> bool:
    """Take from a message whatever says whether it is learnt, by any of its names; return whether it is."""
    switches = {name: message.pop(name) for name in _SWITCHES if name in message}
    for name, value in switches.items():
        if value not in (0, 1):
            raise SettingsError(
                f"{turn} has the `{name}` {shorten(value)}, expected 1 (or true), or 0 (or false) for a turn that is "
                "not to be learnt."
            )
        if value and role != "assistant":
            raise SettingsError(
                f"{turn} has the `{name}` {shorten(value)}, but only turns of the assistant are learnt. Remove it."
            )
        if value != (first := next(iter(switches.values()))):
            raise SettingsError(
                f"{turn} has the `{next(iter(switches))}` {shorten(first)}, but the `{name}` {shorten(value)}. "
                "Remove one."
            )
    return role != "assistant" or all(switches.values())


def check_is_whole(turn: str, role: str, message: Mapping[str, Any], texts: Iterable[object]) -> None:
    """Refuse a turn of which only a part is to be learnt, as axolotl says in `train_detail` or in parts of a text.

    The `texts` are its content and its reasoning.
    """
    if message.get("train_detail"):
        raise SettingsError(f"{turn} has the `train_detail` {shorten(message['train_detail'])}, {_WHOLE}")
    for part in chain(*(text for text in texts if isinstance(text, list) and role == "assistant")):
        for name in _SWITCHES:
            if isinstance(part, Mapping) and part.get(name) not in (None, 1):
                raise SettingsError(f"{turn} has a content part with the `{name}` {shorten(part[name])}, {_WHOLE}")
