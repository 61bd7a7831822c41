"""What a row says and its chat template does not write: nothing of a turn that is learnt may be lost in silence."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from lightning_sft.data.chat.chat_template import ChatTemplate
from lightning_sft.data.chat.conversation import CALLS_AS_TEXT, REASONING, Conversation, Message
from lightning_sft.data.chat.turns import Turn, short_conversation
from lightning_sft.errors import SettingsError, shorten

_MARK_OF_REASONING = "</?think>"
_NUM_TELLING = 8  # a text of so many characters hardly stands in another field of the turn by chance


@dataclass(frozen=True)
class Field:
    """Something that a turn says.

    Attributes:
        name: How messages call it, such as `tool_calls`.
        value: A text or another scalar.
        without: The turn with something else instead, or with nothing.
        can_be_found: Whether a turn that holds the value writes the field; not if the turn says the same elsewhere.
    """

    name: str
    value: Any
    without: Message
    can_be_found: bool = True


def check_is_written(template: ChatTemplate, conversation: Conversation, turn: Turn) -> str:
    """Refuse a turn of which the template does not write a field.

    A field is written if the turn holds it as it is. Otherwise the turn is written once more with something else in its
    place: what makes no difference is not written.

    Returns:
        What stands before the answer in the content and is left out, as DeepSeek's templates leave out the reasoning;
        usually "".
    """
    message = conversation.messages[turn.index]

    def is_written(field: Field) -> bool:
        is_found = field.can_be_found and _holds(turn.response, field.value)
        return is_found or _matters(template, conversation, turn.index, field.without)

    texts = list(_texts_of_content(template, turn, message))
    for field in [*texts[-1:], *_fields(message)]:
        if not is_written(field):
            raise SettingsError(
                f"turn {turn.index + 1} (assistant) has the `{field.name}` {shorten(field.value)}, which the chat "
                "template does not write, so that it would not be learnt. Give a `chat_template` that writes it, leave "
                f"`{field.name}` out, or give the turn the `weight` 0."
            )
    return next((str(text.value) for text in texts[:-1] if not is_written(text)), "")


def check_tools_are_written(template: ChatTemplate, conversation: Conversation, text: str) -> None:
    """Refuse tools that make no difference to the `text` that the template writes."""
    if not conversation.tools:
        return
    try:
        without_tools = template.write(replace(conversation, tools=None))
    except SettingsError:  # it looks at them
        return
    if without_tools == text:
        raise SettingsError(
            f"`tools` is {shorten(conversation.tools)}, but the chat template does not write tools, so that the model "
            "would learn to call what it does not see. Give a `chat_template` that writes them, or leave out `tools`."
        )


def unwritten_message(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[Turn], text: str
) -> Message | None:
    """The first message of the system or a tool, before a turn that is learnt, that the template writes nowhere.

    It may be written otherwise than it stands there. Then other words in it change the `text` of the conversation.
    """
    texts = [text, *(turn.text for turn in turns)]
    for index, message in enumerate(conversation.messages[: turns[-1].index]):
        content = message["content"].strip()
        if message["role"] in ("user", "assistant") or not content or any(content in each for each in texts):
            continue
        messages = list(conversation.messages)
        messages[index] = {**message, "content": f"{content} other"}
        with suppress(SettingsError):  # it looks at the content
            if template.write(replace(conversation, messages=messages)) == text:
                return message
    return None


def _matters(template: ChatTemplate, conversation: Conversation, index: int, other: Message) -> bool:
    """Whether the template writes something else, at the end of a short conversation, if a turn is another one."""
    short = short_conversation(conversation, index)
    num_before = index - (len(conversation.messages) - len(short.messages))
    try:
        changed = template.write(replace(short, messages=[*short.messages[:num_before], other]))
    except SettingsError:  # it looks at the field
        return True
    return changed != template.write(short, num_before + 1)


def _texts_of_content(template: ChatTemplate, turn: Turn, message: Message) -> Iterator[Field]:
    """The texts of a turn's content, the answer last: all of it, or what stands between the marks within it.

    Marks are those of reasoning, and special tokens: by these a template may divide the content, and leave a part out.
    """
    content = message["content"]
    says_more = any(map(message.get, ("tool_calls", CALLS_AS_TEXT, *REASONING)))
    marks = re.compile(f"{_MARK_OF_REASONING}|{template.special_tokens.pattern}")
    spans = [] if _holds(turn.response, content) else [mark.span() for mark in marks.finditer(content)]
    bounds = [0, *chain(*spans), len(content)]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        text = content[start:end].strip()
        if text:
            end = start + len(content[start:end].rstrip())
            other = {**message, "content": f"{content[:end]} other{content[end:]}"}
            yield Field("content", text, other, _is_telling(text) or not (says_more or spans))


def _fields(message: Message) -> Iterator[Field]:
    """What a turn says beside its content."""
    names = [name for name in REASONING if message.get(name)]
    for name in names:  # a template that knows one of them may be told the same by another
        without = {each: f"other {message[each]}" for each in names if message[each] == message[name]}
        yield Field(name, message[name], {**message, **without}, _is_telling(message[name]))
    if isinstance(text := message.get(CALLS_AS_TEXT), str) and text.strip():
        yield Field(CALLS_AS_TEXT, text, {**message, CALLS_AS_TEXT: f"other {text}"}, _is_telling(text))
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        function = call["function"]
        for key in ("name", "arguments"):
            for value, without in _scalars(function.get(key)):
                other = {**call, "function": {**function, key: without}}
                others = {"tool_calls": [*calls[:number], other, *calls[number + 1 :]]}
                yield Field("tool_calls", value, {**message, **others}, _is_telling(value))
        if len(calls) > 1:  # another one may say the same
            others = {"tool_calls": [*calls[:number], *calls[number + 1 :]]}
            yield Field("tool_calls", function, {**message, **others}, can_be_found=False)


def _is_telling(value: Any) -> bool:
    return len(str(value)) >= _NUM_TELLING


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
