"""Conversations: the messages of a row, in any of the usual spellings, as chat templates expect them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

from lightning_sft.checks import check_type
from lightning_sft.data.chat.switches import check_is_whole, take_switches
from lightning_sft.errors import SettingsError, one_line, shorten

Message: TypeAlias = dict[str, Any]

SYSTEM_ROLES = ("system", "developer")
_CALL_ROLES = ("function_call", "tool_call")  # of turns that are nothing but calls
_ROLES = {  # what people call them, and what chat templates do
    **{role: role for role in SYSTEM_ROLES},
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", *_CALL_ROLES), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "function", "function_response", "observation"), "tool"),
    **dict.fromkeys(("ipython", "environment"), "tool"),
}

_TAKEN_VARIABLES = {"messages", "conversations", "tools", "chat_template", "add_generation_prompt"}
_TAKEN_VARIABLES |= {"continue_final_message", "return_assistant_tokens_mask"}

REASONING = ("reasoning_content", "thinking", "reasoning")  # `transformers` gives each of them by the other names too
CALLS_AS_TEXT = "function_calls"  # of OLMo 3: the calls as its template writes them


@dataclass(frozen=True)
class Conversation:
    """Messages as templates expect them, and what else a template is given.

    Attributes:
        messages: Each with `role` and `content`; some with `tool_calls` and whatever else their template knows. One of
            the assistant's with the `weight` 0 is not learnt; no other has a `weight`.
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
        row: Has the columns, and may have `tools` (or `functions`, as OpenAI called them before) and
            `chat_template_kwargs`, too, as objects or as JSON text, and `system`, the text of a first turn, from which
            turns are counted then.
        columns: The name of one column for all messages, or of two: one for a prompt, and one for what follows, which
            may be missing. Each holds a list of messages in OpenAI's spelling (`role`, `content`) or ShareGPT's
            (`from`, `value`), or such a list as JSON text. Of two, one may hold plain text. A turn of the assistant
            is not learnt if its `weight`, `train`, `trainable`, `training`, `loss`, `loss_mask`, `loss_weight` or
            `loss_scale` is 0 or false. A turn of a `function_call` or `tool_call` continues one of the assistant
            right before it, and turns are counted without it then.
        variables: For the template; the row's own `chat_template_kwargs` come first.
    """
    parts: list[list[Message]] = []
    for column, role in zip(columns, ("user", "assistant"), strict=False):
        value = row.get(column)
        if len(columns) == 2 and isinstance(value, str):
            parts.append([{"role": role, "content": value}])
        elif value is not None or not parts:
            parts.append(_read_messages(column, value))
    parts[0][:0] = _read_system(row.get("system"), parts[0][0])
    own = _from_json("`chat_template_kwargs`", row.get("chat_template_kwargs") or {}, dict, "an object")
    check_variables(own)
    num_prompt_messages = len(parts[0]) if len(columns) == 2 else 0
    return Conversation([*chain(*parts)], num_prompt_messages, _read_tools(row), {**(variables or {}), **own})


def is_asked(messages: object) -> bool:
    """Whether these are messages of which the last one is not the assistant's."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    role = (last.get("role") or last.get("from")) if isinstance(last, Mapping) else None
    return isinstance(role, str) and _ROLES.get(role, "assistant") != "assistant"


def check_variables(variables: Mapping[str, Any]) -> None:
    """Refuse `chat_template_kwargs` that say how the template is called, not what it can use."""
    for name in sorted(_TAKEN_VARIABLES & set(variables)):
        raise SettingsError(
            f"`chat_template_kwargs` has `{name}`, which tells `transformers` how to call the template. Remove it; "
            "messages and tools have their own columns."
        )


def _read_system(system: object, first: Message) -> list[Message]:
    """The turn that the column `system` puts before the first one."""
    if system is None or system == "":
        return []
    check_type("system", system, str, "a string")
    if first["role"] not in SYSTEM_ROLES:
        return [{"role": "system", "content": system}]
    if first["content"] != system:
        raise SettingsError(
            f"`system` is {shorten(system)}, but turn 1 ({first['role']}) is {shorten(first['content'])}. Remove one."
        )
    return []


def _read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row as OpenAI spells them now; before, and elsewhere, each was nothing but its function.

    An empty text, such as a CSV file has where a row has no tools, is none.
    """
    tools = _from_json("`tools`", row.get("tools") or [], list, "a list of tools")
    functions = _from_json("`functions`", row.get("functions") or [], list, "a list of functions")
    if tools and functions:
        raise SettingsError("the row has both `tools` and `functions`. Remove one.")
    column, found = ("tools", tools) if tools else ("functions", functions)
    return [_read_tool(f"`{column}`, number {number}", tool) for number, tool in enumerate(found, 1)] or None


def _read_tool(name: str, tool: object) -> dict[str, Any]:
    found: dict[str, Any] | None = _from_json(name, tool, dict, "an object")
    if not found:
        raise SettingsError(f"{name} is {shorten(tool)}, expected an object.")
    if "function" not in found and "name" in found and found.get("type", "function") == "function":
        found = {"type": "function", "function": {key: value for key, value in found.items() if key != "type"}}
    function = found.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("parameters"), str):  # axolotl advises that
        parameters = _from_json(f"{name}, parameters", function["parameters"], dict, "a JSON object")
        found = {**found, "function": {**function, "parameters": parameters}}
    return found


def _read_messages(column: str, value: object) -> list[Message]:
    messages = _from_json(f"`{column}`", value, list, "a list of messages")
    if not messages:
        raise SettingsError(f"`{column}` has no messages; expected at least one.")
    read: list[Message] = []
    for number, message in enumerate(messages, 1):
        turn = f"`{column}`, turn {number}"
        found = _read_message(turn, message)
        is_call = any(message.get(key) in _CALL_ROLES for key in ("role", "from"))
        if is_call and read and read[-1]["role"] == "assistant":
            read[-1] = _with_calls(turn, read[-1], found)
        else:
            read.append(found)
    return read


def _with_calls(turn: str, message: Message, calls: Message) -> Message:
    """The assistant's message with the calls of the turn after it, which is part of the same answer."""
    if message.get("weight") != calls.get("weight"):
        raise SettingsError(
            f"{turn} (assistant) continues the turn before it, but only one of them is to be learnt, and a turn is "
            "learnt as a whole or not at all. Give both the same `weight`."
        )
    return {**message, "tool_calls": [*message.get("tool_calls", ()), *calls.get("tool_calls", ())]}


def _read_message(turn: str, message: object) -> Message:
    """A message in OpenAI's spelling; `turn` is what errors call it."""
    if not isinstance(message, Mapping):
        raise SettingsError(f"{turn} is {shorten(message)}, expected an object with `role` and `content`.")
    rest = {key: value for key, value in message.items() if value is not None}  # columns that other rows have
    role, content = rest.pop("role", rest.pop("from", None)), rest.pop("content", rest.pop("value", None))
    if not isinstance(role, str) or role not in _ROLES:
        raise SettingsError(f"{turn} has the role {shorten(role)}, expected one of {', '.join(_ROLES)}.")
    calls, content = _take_calls(turn, role, rest, content)
    role = _ROLES[role]
    turn = f"{turn} ({role})"
    check_is_whole(turn, role, rest, [content, *map(rest.get, REASONING)])
    if role == "assistant":
        content = _take_reasoning(turn, rest, content)
    if content is None and role == "assistant" and any(map(rest.get, (*REASONING, CALLS_AS_TEXT))):
        content = ""
    if isinstance(content, list):  # a template that expects text would write such a list out as Python does
        content = _joined(turn, content)
    if not isinstance(content, str):
        way_out = " Write the object as JSON text." if isinstance(content, Mapping) else ""
        raise SettingsError(f"{turn} has the content {shorten(content)}, expected a string.{way_out}")
    is_learnt = take_switches(turn, role, rest)
    return {"role": role, "content": content, **calls, **rest, **({} if is_learnt else {"weight": 0})}


def _take_calls(turn: str, role: str, rest: Message, content: object) -> tuple[Message, object]:
    """Take a message's tool calls from it; return them as `tool_calls`, if there are any, and the content beside them.

    OpenAI has them in `tool_calls`, and before that had one in `function_call`; a turn from ShareGPT's `function_call`
    or ms-swift's `tool_call` has nothing else to say.
    """
    spellings = {key: value for key in ("tool_calls", "function_call") if (value := rest.pop(key, None))}
    if role in _CALL_ROLES:
        spellings["content"], content = content, None
    if len(spellings) > 1:
        raise SettingsError(f"{turn} has calls in `{'` and in `'.join(spellings)}`. Remove one.")
    for key, value in spellings.items():
        calls = _from_json(f"{turn}, {key}", value, (list, dict), "a call or a list of calls")
        if calls:
            calls = [_read_call(turn, call) for call in (calls if isinstance(calls, list) else [calls])]
            return {"tool_calls": calls}, "" if content is None else content
    return {}, content


def _take_reasoning(turn: str, rest: Message, content: object) -> object:
    """Make texts of the reasoning of an assistant's message; return the content without it.

    Mistral's content begins with parts of reasoning, each a text or a list of text parts.
    """
    for name in REASONING:
        if isinstance(rest.get(name), list):
            rest[name] = _joined(turn, rest[name])
        elif not isinstance(rest.get(name, ""), str):
            raise SettingsError(f"{turn} has the `{name}` {shorten(rest[name])}, expected a string.")
    parts = list(content) if isinstance(content, list) else []
    thoughts: list[object] = []
    while parts and isinstance(parts[0], Mapping) and parts[0].get("type") == "thinking":
        thought = parts.pop(0).get("thinking")
        thoughts += thought if isinstance(thought, list) else [{"text": thought}]
    if not thoughts:
        return content
    for name in filter(rest.get, REASONING):
        raise SettingsError(f"{turn} has reasoning in `content` and in `{name}`. Remove one.")
    rest[REASONING[0]] = _joined(turn, thoughts)
    return parts


def _joined(turn: str, parts: Sequence[object]) -> str:
    """The texts of parts, one after another; some call a text `value` or `content`."""
    return "".join(_part_text(turn, part) for part in parts)


def _part_text(turn: str, part: object) -> str:
    values = map(part.get, ("text", "value", "content")) if isinstance(part, Mapping) else iter(())
    text = next((value for value in values if value is not None), None)
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(text, str):
        raise SettingsError(f"{turn} has the content part {shorten(part)}, expected text parts only.")
    return text


def _read_call(turn: str, call: object) -> dict[str, Any]:
    """A tool call as OpenAI spells it, with its arguments as an object, which templates turn into JSON themselves."""
    if not isinstance(call, Mapping):
        raise SettingsError(f"{turn} has the tool call {shorten(call)}, expected an object.")
    if "function" not in call:  # a function's name and arguments alone
        outer = {key: value for key, value in call.items() if key in ("id", "type")}
        call = {**outer, "function": {key: value for key, value in call.items() if key not in outer}}
    inner = call["function"]
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise SettingsError(f"{turn} has the tool call {shorten(call)}, expected one with the `name` of a function.")
    if isinstance(inner.get("arguments"), str):
        arguments = _from_json(f"{turn}, arguments", inner["arguments"] or "{}", dict, "a JSON object")
        inner = {**inner, "arguments": arguments}
    return {"type": "function", **call, "function": dict(inner)}


def _from_json(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> Any:
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
