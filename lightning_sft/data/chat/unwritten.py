"""What a row says and its chat template does not write: nothing of a turn that is learnt may be lost in silence."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_sft.data.chat.chat_template import ChatTemplate
from lightning_sft.data.chat.conversation import Conversation, Message
from lightning_sft.data.chat.turns import Turn, short_conversation
from lightning_sft.errors import SettingsError, shorten

_REASONING = ("reasoning_content", "thinking", "reasoning")  # `transformers` gives each of them by the other names too
_END_OF_REASONING = "</think>"
_NUM_TELLING = 8  # a text of so many characters hardly stands in another field of the turn by chance


@dataclass(frozen=True)
class Field:
    """Something that a turn says.

    Attributes:
        name: How messages call it, such as `tool_calls`.
        value: A text or another scalar.
        without: The turn with something else instead.
    """

    name: str
    value: Any
    without: Message


def check_is_written(template: ChatTemplate, conversation: Conversation, turn: Turn) -> str:
    """Refuse a turn of which the template does not write a field.

    A field is written if the turn holds it as it is. Otherwise the turn is written once more with something else in its
    place: what makes no difference is not written.

    Args:
        template: Writes the conversation.
        conversation: All messages.
        turn: One of the assistant's turns, as the template writes it.

    Returns:
        The reasoning within the content that the template leaves out, as those of DeepSeek's models do; usually "".

    Raises:
        SettingsError: The message names turn, field and the way out.
    """
    written = turn.response
    message = conversation.messages[turn.index]
    says_more = message.get("tool_calls") or any(map(message.get, _REASONING))
    for field in _fields(message):
        is_written = _holds(written, field.value) and (not says_more or len(str(field.value)) >= _NUM_TELLING)
        if not is_written and not _matters(template, conversation, turn.index, field.without):
            raise SettingsError(
                f"turn {turn.index + 1} (assistant) has the `{field.name}` {shorten(field.value)}, which the chat "
                "template does not write, so that it would not be learnt. Give a `chat_template` that writes it, leave "
                f"`{field.name}` out, or give the turn the `weight` 0."
            )
    reasoning, mark, answer = message["content"].rpartition(_END_OF_REASONING)
    reasoning = reasoning.strip().removeprefix("<think>").strip()
    if not mark or not reasoning or _holds(written, reasoning):
        return ""
    other = {**message, "content": f"<think>other {reasoning}{mark}{answer}"}
    return "" if _matters(template, conversation, turn.index, other) else str(reasoning)


def check_tools_are_written(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Refuse tools that make no difference to what the template writes.

    Args:
        template: Writes the conversation.
        conversation: All messages, and the tools.
        text: The conversation as the template writes it.

    Raises:
        SettingsError: The message names the way out.
    """
    if conversation.tools and template.write(replace(conversation, tools=None)) == text:
        raise SettingsError(
            f"`tools` is {shorten(conversation.tools)}, but the chat template does not write tools, so that the model "
            "would learn to call what it does not see. Give a `chat_template` that writes them, or leave out `tools`."
        )


def _matters(template: ChatTemplate, conversation: Conversation, index: int, other: Message) -> bool:
    """Whether the template writes something else, at the end of a short conversation, if a turn is another one."""
    short = short_conversation(conversation, index)
    num_before = index - (len(conversation.messages) - len(short.messages))
    try:
        changed = template.write(replace(short, messages=[*short.messages[:num_before], other]))
    except SettingsError:  # it looks at the field
        return True
    return changed != template.write(short, num_before + 1)


def _fields(message: Message) -> Iterator[Field]:
    if message["content"].strip():
        yield Field("content", message["content"], {**message, "content": f"{message['content']} other"})
    reasoning = next((name for name in _REASONING if message.get(name)), None)
    if reasoning is not None:
        others = {name: f"other {message[name]}" for name in _REASONING if message.get(name)}
        yield Field(reasoning, message[reasoning], {**message, **others})
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        for key in ("name", "arguments"):
            for value, without in _scalars(function.get(key)):
                other = {**function, key: without}
                calls = list(message["tool_calls"])
                calls[number] = {**call, "function": other} if "function" in call else other
                yield Field("tool_calls", value, {**message, "tool_calls": calls})


def _scalars(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each scalar within a value, with the value as it is with another in its place."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            for scalar, without in _scalars(item):
                yield scalar, {**value, key: without}
    elif isinstance(value, list):
        for index, item in enumerate(value):
            for scalar, without in _scalars(item):
                yield scalar, [*value[:index], without, *value[index + 1 :]]
    elif isinstance(value, str):
        yield value, f"other {value}"
    elif value is not None:
        yield value, "other"


def _holds(written: str, value: Any) -> bool:
    if not isinstance(value, str):
        return json.dumps(value) in written
    text = value.strip()
    return text in written or any(json.dumps(text, ensure_ascii=ascii)[1:-1] in written for ascii in (True, False))
