"""Conversations: written by the tokenizer's chat template, with the assistant's turns found in its text and ids.

Nothing about a template is assumed. A turn begins where the template's own generation prompt for it ends, which must
stand in the whole conversation as it is; it ends with the last special token before the template goes on; and both
must fall between two tokens. Where one of these fails there is an error, never a mask that is nearly right. Marks that
a template may have of its own (`{% generation %}`) are not needed, and not asked.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_type
from lightning_sft.data.example import Example
from lightning_sft.errors import MissingFileError, SettingsError, one_line, shorten

TrainOnTurns = Literal["all", "last"]

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

    messages: list[dict[str, Any]]
    num_prompt_messages: int = 0
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WrittenConversation:
    """A conversation as its template writes it.

    Attributes:
        text: All of it.
        turns: Number (from 1), start and end (in characters of `text`) of each assistant's turn to learn from.
        prompt: The text up to the last of these turns, generation prompt included.
        output: The last of these turns, without the token that ends it.
        content: What the last turn says, without what the template adds; `output` if that is nothing.
    """

    text: str
    turns: list[tuple[int, int, int]]
    prompt: str
    output: str
    content: str


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
    parts: list[list[dict[str, Any]]] = []
    for column, role in zip(columns, ("user", "assistant"), strict=False):
        value = row.get(column)
        if len(columns) == 2 and isinstance(value, str):
            parts.append([{"role": role, "content": value}])
        elif value is not None or not parts:
            parts.append(_read_messages(column, value))
    parts[0][:0] = _read_system(row.get("system"), parts[0][0])
    tools = _from_json("tools", row.get("tools"), list, "a list of tools") or None
    own = _from_json("chat_template_kwargs", row.get("chat_template_kwargs"), dict, "an object") or {}
    num_prompt_messages = len(parts[0]) if len(columns) == 2 else 0
    return Conversation([*chain(*parts)], num_prompt_messages, tools, {**(variables or {}), **own})


def _read_system(system: object, first: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def _read_messages(column: str, value: object) -> list[dict[str, Any]]:
    messages = _from_json(column, value, list, "a list of messages")
    if not messages:
        raise SettingsError(f"`{column}` has no messages; expected at least one.")
    return [_read_message(f"`{column}`, turn {number}", message) for number, message in enumerate(messages, 1)]


def _read_message(place: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise SettingsError(f"{place} is {shorten(message)}, expected an object with `role` and `content`.")
    rest = {key: value for key, value in message.items() if value is not None}  # columns that other rows have
    role, content = rest.pop("role", rest.pop("from", None)), rest.pop("content", rest.pop("value", None))
    if not isinstance(role, str) or role not in _ROLES:
        raise SettingsError(f"{place} has the role {shorten(role)}, expected one of {', '.join(_ROLES)}.")
    if isinstance(content, list):  # a template that expects text would write such a list out as Python does
        content = "".join(_part_text(place, part) for part in content)
    if calls := rest.get("tool_calls"):
        rest["tool_calls"] = [
            _read_call(place, call) for call in _from_json(f"{place}, tool_calls", calls, list, "a list")
        ]
        content = "" if content is None else content
    if not isinstance(content, str):
        raise SettingsError(f"{place} ({role}) has the content {shorten(content)}, expected a string.")
    if rest.get("weight", 1) not in (0, 1):
        raise SettingsError(
            f"{place} ({role}) has the `weight` {shorten(rest['weight'])}, expected 1, or 0 for a turn that is not to "
            "be learnt."
        )
    return {"role": _ROLES[role], "content": content, **rest}


def _part_text(place: str, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise SettingsError(f"{place} has the content part {shorten(part)}, expected text parts only.")
    return text


def _read_call(place: str, call: object) -> Any:
    """Its arguments as an object, which is what templates turn into JSON themselves."""
    if not isinstance(call, Mapping):
        raise SettingsError(f"{place} has the tool call {shorten(call)}, expected an object.")
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("arguments"), str):
        return dict(call)
    arguments = _from_json(f"{place}, arguments", inner["arguments"], dict, "a JSON object")
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _from_json(name: str, value: object, kind: type, expected: str) -> Any:
    name = name if name.startswith("`") else f"`{name}`"
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{name} is {shorten(value)}, which is not JSON: {one_line(error)}.") from None
    if found is not None and not isinstance(found, kind):
        raise SettingsError(f"{name} is {shorten(value)} of type {type(value).__name__}, expected {expected}.")
    return found


class ChatTemplate:
    """A tokenizer's chat template, which writes conversations.

    Args:
        tokenizer: Any Hugging Face tokenizer; it needs a chat template by the time that something is written.
        train_on_turns: Which of the assistant's turns are marked: all, or the last one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on_turns: TrainOnTurns = "all") -> None:
        self._tokenizer, self._train_on_turns = tokenizer, train_on_turns

    def write(self, conversation: Conversation) -> WrittenConversation:
        """The whole conversation, with the assistant's turns marked.

        Raises:
            ValueError: If there is no turn to learn from, the template refuses the conversation, or a turn's start and
                end cannot be told for certain; the message names the turn.
        """
        messages = conversation.messages
        turns = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index >= conversation.num_prompt_messages
        ]
        if self._train_on_turns == "last":
            turns = turns[-1:]
        weighted = [index for index in turns if messages[index].get("weight") != 0]
        if not weighted:
            raise SettingsError(self._nothing_to_learn(conversation, turns))
        turns = weighted
        text = self._apply(conversation, messages)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(error.start - 20, 0) : error.start + 20]
            raise SettingsError(f"the messages hold a lone surrogate, which is not text: {around!a}.") from None
        marked, closing = [], 0
        for index in turns:
            start = self._start(conversation, index, text)
            closing, end = self._end(conversation, index, text, start)
            marked.append((index + 1, start, end))
        output = text[start:closing]
        return WrittenConversation(text, marked, text[:start], output, messages[turns[-1]]["content"] or output)

    def _nothing_to_learn(self, conversation: Conversation, unweighted: Sequence[int]) -> str:
        messages = conversation.messages
        if unweighted and self._train_on_turns == "last":
            return (
                f"turn {unweighted[0] + 1} (assistant), the last one, has the `weight` 0, but `train_on_turns` is "
                '"last". Remove the turn, or set `train_on_turns` to "all".'
            )
        if unweighted:
            return f"all {len(unweighted)} turns of the assistant have the `weight` 0. Remove the row."
        if any(message["role"] == "assistant" for message in messages[: conversation.num_prompt_messages]):
            return (
                f"no turn of the assistant to learn from: all {len(messages)} messages are in `prompt_field`, and a "
                "prompt is not learnt. Rename a column of whole conversations to `messages`, and leave out "
                "`prompt_field`."
            )
        return f"no turn of the assistant to learn from among {len(messages)} messages. Remove the row."

    def write_prompt(self, conversation: Conversation) -> tuple[str, str | None]:
        """The text for the model to go on from, and what an assistant's turn at the end says (None if there is none).

        Raises:
            ValueError: If the template refuses the conversation.
        """
        *before, final = conversation.messages
        if final["role"] != "assistant":
            return self._apply(conversation, conversation.messages, add_generation_prompt=True), None
        self._check_not_first(before)
        return self._apply(conversation, before, add_generation_prompt=True), final["content"]

    def _apply(self, conversation: Conversation, messages: list[Any], add_generation_prompt: bool = False) -> str:
        if not self._tokenizer.chat_template:
            raise SettingsError(
                "the row has messages, but the tokenizer has no chat template. Pass `chat_template`, a text or a file, "
                "or name the columns of a prompt and an output."
            )
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "tools": conversation.tools}
        try:
            return str(self._tokenizer.apply_chat_template(messages, **{**conversation.variables, **options}))
        except Exception as error:  # whatever a template raises
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise SettingsError(f"the chat template refuses the first {len(messages)} messages: {reason}") from error

    def _check_not_first(self, before: list[Any]) -> None:
        if not before:
            raise SettingsError("turn 1 (assistant) has nothing before it that a model could answer. Remove it.")

    def _start(self, conversation: Conversation, index: int, text: str) -> int:
        """Where the template's generation prompt for a turn ends, which must be how the whole text begins."""
        before = conversation.messages[:index]
        self._check_not_first(before)
        prompt = self._apply(conversation, before, add_generation_prompt=True)
        if not text.startswith(prompt):
            at = _common(prompt, text)
            raise SettingsError(
                f"turn {index + 1} (assistant): to prompt for it the chat template writes {_around(prompt, at)}, but "
                f"in the whole conversation {_around(text, at)}: what it writes depends on later turns. "
                f"{self._way_out(conversation, index)}"
            )
        return len(prompt)

    def _end(self, conversation: Conversation, index: int, text: str, start: int) -> tuple[int, int]:
        """Start and end of the token that ends a turn: the last special token before the template goes on."""
        closed, goes_on, upto = text, text, conversation.messages[: index + 1]
        if len(upto) < len(conversation.messages):
            closed = self._apply(conversation, upto)
        special = list(self._special_tokens.finditer(closed, start))
        if closed is text and len(special) > 1 and not text[special[-2].end() : special[-1].start()].strip():
            # Some templates close whole conversations with one more token. A model never gets to write that one.
            goes_on = self._apply(conversation, upto, add_generation_prompt=True)
        limit = len(closed) if goes_on.startswith(closed) else _common(closed, goes_on)
        limit = next((token.start() for token in special if token.start() < limit < token.end()), limit)
        closing = max((token.span() for token in special if token.end() <= limit), default=None)
        no_end = closing is None or closed[closing[1] : limit].strip()
        if self._special_tokens.sub("", closed[limit:]).strip() or (no_end and limit < len(closed)):
            raise SettingsError(
                f"turn {index + 1} (assistant): the chat template writes {_around(closed, limit)}, but when others "
                f"follow {_around(goes_on, limit)}. {self._way_out(conversation, index)}"
            )
        if closing is None or no_end:
            raise SettingsError(
                f"turn {index + 1} (assistant): it ends in {closed[max(limit - 20, start) : limit]!r}, in no special "
                "token, so that a model could not learn where to stop. Let it end in one of the tokenizer's "
                "(`tokenizer.add_special_tokens`), or give another `chat_template`."
            )
        return closing

    def _way_out(self, conversation: Conversation, index: int) -> str:
        later = any(message["role"] == "assistant" for message in conversation.messages[index + 1 :])
        return "Give another `chat_template`" + (', or set `train_on_turns` to "last".' if later else ".")

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        tokens = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(self._tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    def encode(self, written: Sequence[WrittenConversation]) -> Iterator[Example]:
        """Token ids of each text, exactly those that `apply_chat_template` gives, with the marked turns as response.

        A text is cut at the turns' bounds. Where its pieces have the same tokens as the whole, or else where the text
        up to each bound has the tokens that the whole begins with, the bounds fall between two tokens.

        Raises:
            ValueError: If one does not; the message names the turn.
        """
        cuts = [[0, *chain(*(turn[1:] for turn in each.turns)), len(each.text)] for each in written]
        texts = [each.text for each in written]
        pieces = ((each.text, *pair) for each, bounds in zip(written, cuts, strict=True) for pair in pairwise(bounds))
        piece_ids = iter(self._ids([text[start:end] for text, start, end in pieces]))
        for each, bounds, ids in zip(written, cuts, self._ids(texts), strict=True):
            apart = [next(piece_ids) for _ in range(len(bounds) - 1)]
            whole = list(chain(*apart)) == ids
            first, *rest = accumulate(map(len, apart[:-1])) if whole else self._ends(each, ids)
            spans = [*rest, len(ids)] if rest[-1] < len(ids) else rest[:-1]
            yield Example(input_ids=ids, num_prompt_tokens=first, excluded_spans=spans)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _ends(self, written: WrittenConversation, ids: list[int]) -> list[int]:
        """The turns' bounds in tokens: how many tokens the text up to each bound has."""
        ends = []
        for number, *bounds in written.turns:
            for bound, side in zip(bounds, ("begins", "ends"), strict=True):
                (before,) = self._ids([written.text[:bound]])
                if ids[: len(before)] != before:
                    raise SettingsError(
                        f"turn {number} (assistant) {side} within a token, between "
                        f"{written.text[max(bound - 20, 0) : bound]!r} and {written.text[bound : bound + 20]!r}. "
                        "Give another `chat_template`."
                    )
                ends.append(len(before))
        return ends


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    differ = (at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(first), len(second)))


def _around(text: str, at: int) -> str:
    return repr(text[max(at - 20, 0) : at + 20])


def read_chat_template(chat_template: str) -> str:
    """A template's text, given as itself or as the path of a file that holds it.

    Raises:
        FileNotFoundError: If it has no braces, and is no file either.
        TypeError: If it is no string.
        ValueError: If the file is not UTF-8 text.
    """
    check_type("chat_template", chat_template, str, "a text or the path of a file, as a string")
    if "{" not in chat_template:
        if not os.path.isfile(chat_template):
            raise MissingFileError(
                f"`chat_template` is {chat_template!r}, which has no {{{{ }}}} in it and is no file either. Give the "
                "template's text, or the path of a file with it."
            )
        try:
            return Path(chat_template).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text ({error.reason}). Save the file as UTF-8."
            raise SettingsError(f"`chat_template` is {chat_template!r}, which is {problem}") from None
    return chat_template


def with_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with another chat template."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn; None where there is no such thing."""
    template = ChatTemplate(tokenizer)
    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        (encoded,) = template.encode([template.write(Conversation(example))])
    except SettingsError:  # no template, or one for other conversations: nothing was learnt with it
        return None
    return encoded.input_ids[min([*encoded.excluded_spans, len(encoded.input_ids)]) - 1]
