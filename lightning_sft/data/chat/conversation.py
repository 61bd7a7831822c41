"""Conversations: the messages of a row, in any of the usual spellings, as chat templates expect them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

from lightning_sft.errors import SettingsError, one_line, shorten

Message: TypeAlias = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages as templates expect them, and what else a template is given.

    Attributes:
        messages: Each with `role` and `content`; some with `tool_calls` and whatever else their template knows. One
            with the `weight` 0 is not learnt.
        num_prompt_messages: This many at the start are a prompt: nothing of them is learnt.
        tools: The schemas of the tools that the assistant may call.
        variables: More that the template can use, by name.
    """

    messages: list[Message]
    num_prompt_messages: int = 0
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def read_conversation(
    row: Mapping[str, Any], columns: Sequence[str], variables: Mapping[str, Any] | None = None
) -> Conversation:
    """The conversation of a row.

    Args:
        row: Has the columns, and may have `tools` and `chat_template_kwargs`, too, as objects or as JSON text, and
            `system`, the text of a first turn, from which turns are counted then.
        columns: The name of one column for all messages, or of two: one for a prompt, and one for what follows, which
            may be missing. Each holds a list of messages in OpenAI's spelling (`role`, `content`, for a turn that is
            not to be learnt `weight` 0) or ShareGPT's (`from`, `value`), or such a list as JSON text. Of two, one may
            hold plain text.
        variables: For the template; the row's own `chat_template_kwargs` come first.

    Raises:
        ValueError: If there is no message, or one is not of this form; the message names column and turn. Or if
            `system` is no text, or not that of the system turn that is there already.
    """
    parts: list[list[Message]] = []
    for column, role in zip(columns, ("user", "assistant"), strict=False):
        value = row.get(column)
        if len(columns) == 2 and isinstance(value, str):
            parts.append([{"role": role, "content": value}])
        elif value is not None or not parts:
            parts.append(_read_messages(column, value))
    parts[0][:0] = _read_system(row.get("system"), parts[0][0])
    tools = _from_json("`tools`", row.get("tools"), list, "a list of tools") or None
    own = _from_json("`chat_template_kwargs`", row.get("chat_template_kwargs"), dict, "an object") or {}
    num_prompt_messages = len(parts[0]) if len(columns) == 2 else 0
    return Conversation([*chain(*parts)], num_prompt_messages, tools, {**(variables or {}), **own})


def _read_system(system: object, first: Message) -> list[Message]:
    """The turn that the column `system` puts before the first one."""
    if system is None or system == "":
        return []
    if not isinstance(system, str):
        raise SettingsError(f"`system` is {shorten(system)} of type {type(system).__name__}, expected a string.")
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}]
    if first["content"] != system:
        raise SettingsError(
            f"`system` is {shorten(system)}, but turn 1 ({first['role']}) is {shorten(first['content'])}. Remove one."
        )
    return []


def _read_messages(column: str, value: object) -> list[Message]:
    messages = _from_json(f"`{column}`", value, list, "a list of messages")
    if not messages:
        raise SettingsError(f"`{column}` has no messages; expected at least one.")
    return [_read_message(f"`{column}`, turn {number}", message) for number, message in enumerate(messages, 1)]


def _read_message(turn: str, message: object) -> Message:
    """A message in OpenAI's spelling; `turn` is what errors call it."""
    if not isinstance(message, Mapping):
        raise SettingsError(f"{turn} is {shorten(message)}, expected an object with `role` and `content`.")
    rest = {key: value for key, value in message.items() if value is not None}  # columns that other rows have
    role, content = rest.pop("role", rest.pop("from", None)), rest.pop("content", rest.pop("value", None))
    if not isinstance(role, str) or role not in _ROLES:
        raise SettingsError(f"{turn} has the role {shorten(role)}, expected one of {', '.join(_ROLES)}.")
    if isinstance(content, list):  # a template that expects text would write such a list out as Python does
        content = "".join(_part_text(turn, part) for part in content)
    if rest.get("tool_calls"):
        calls = _from_json(f"{turn}, tool_calls", rest["tool_calls"], list, "a list") or []
        rest["tool_calls"] = [_read_call(turn, call) for call in calls]
        content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise SettingsError(f"{turn} ({role}) has the content {shorten(content)}, expected a string.")
    if rest.get("weight", 1) not in (0, 1):
        raise SettingsError(
            f"{turn} ({role}) has the `weight` {shorten(rest['weight'])}, expected 1, or 0 for a turn that is not to "
            "be learnt."
        )
    return {"role": _ROLES[role], "content": content, **rest}


def _part_text(turn: str, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise SettingsError(f"{turn} has the content part {shorten(part)}, expected text parts only.")
    return text


def _read_call(turn: str, call: object) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what templates turn into JSON themselves."""
    if not isinstance(call, Mapping):
        raise SettingsError(f"{turn} has the tool call {shorten(call)}, expected an object.")
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("arguments"), str):
        return dict(call)
    arguments = _from_json(f"{turn}, arguments", inner["arguments"], dict, "a JSON object")
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _from_json(name: str, value: object, kind: type, expected: str) -> Any:
    """A value of this kind, given as itself or as JSON text; or None."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{name} is {shorten(value)}, which is not JSON: {one_line(error)}.") from None
    if found is not None and not isinstance(found, kind):
        raise SettingsError(f"{name} is {shorten(value)} of type {type(value).__name__}, expected {expected}.")
    return found
