"""The chat template of a tokenizer: where it comes from, and what it writes."""

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_sft.checks import check_type
from lightning_sft.data.chat.conversation import REASONING, Conversation, Message
from lightning_sft.data.chat.token_counter import special_token_pattern
from lightning_sft.data.tokens.texts import common_length, read_template_file
from lightning_sft.data.tokens.tokenizer import load_tokenizer
from lightning_sft.errors import MissingFileError, SettingsError, one_line, shorten

_ENVIRONMENT, _TOOL = (re.compile(f"['\"]{role}['\"]") for role in ("environment", "tool"))
_PROBE = "an answer 7391"  # which stands in no template
_KEY = re.compile("['\"]: ?['\"]" + _PROBE)  # of a part that is written out as it is
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as `transformers` looks for it


def read_chat_template(chat_template: str) -> str:
    """A template's text, given as itself, as a file that holds it, or as the name or folder of a tokenizer."""
    check_type("chat_template", chat_template, str, "a text, a file or the name of a tokenizer, as a string")
    if "{" in chat_template:
        return chat_template
    way_out = "Give the template's text, a file with it, or the name or folder of a tokenizer that has it."
    if os.path.isfile(os.path.expanduser(chat_template)):
        return read_template_file("chat_template", chat_template, "{{ }}", way_out)
    try:
        found = load_tokenizer(os.path.expanduser(chat_template)).chat_template
    except SettingsError as error:
        raise MissingFileError(
            f"`chat_template` is {shorten(chat_template)}, which has no {{{{ }}}} in it and is no file, nor does it "
            f"name a tokenizer that can be loaded. {way_out} ({one_line(error.__cause__ or error)})"
        ) from error
    found = found.get("default") if isinstance(found, dict) else found
    if not found:
        raise SettingsError(f"`chat_template` is {chat_template!r}, a tokenizer without a chat template. {way_out}")
    return str(found)


def with_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with another chat template."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


@dataclass(frozen=True)
class SpannedText:
    """A text, and start and end of parts of it, ascending: of what `{% generation %}` marks, or of what is learnt."""

    text: str
    spans: Sequence[tuple[int, int]]


class ChatTemplate:
    """A tokenizer's chat template, which writes conversations; it must be there when the first of them is written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def write(
        self, conversation: Conversation, num_messages: int | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation's first messages, by default of all.

        With `add_generation_prompt` it ends in what stands before an answer of the assistant.
        """
        if not self._tokenizer.chat_template:
            raise SettingsError(
                "the row has messages (or `as_chat` makes them), but the tokenizer has no chat template. Pass "
                "`chat_template`: its text, a file, or a tokenizer that has one; or name the columns of a prompt and "
                "an output."
            )
        messages = self._messages(conversation.messages[:num_messages])
        try:
            return self._apply(messages, conversation, add_generation_prompt=add_generation_prompt).text
        except Exception as error:  # whatever a template raises
            reason = f"{type(error).__name__}: {one_line(error)}"
            these = "the first message" if len(messages) == 1 else f"the first {len(messages)} messages"
            raise SettingsError(f"the chat template refuses {these}: {reason}") from error

    def _apply(self, messages: list[Message], conversation: Conversation, **options: bool) -> SpannedText:
        """What `apply_chat_template` writes, without the checks for which that goes through all messages each time."""
        rendered = render_jinja_template(
            [messages],
            tools=conversation.tools,
            chat_template=self._tokenizer.get_chat_template(tools=conversation.tools),
            **{**self._special_tokens, **conversation.variables, **options},
        )
        texts, spans = cast(tuple[list[str], list[list[tuple[int, int]]]], rendered)  # annotated as a text
        return SpannedText(texts[0], spans[0] if spans else [])

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        return self._tokenizer.special_tokens_map

    def _messages(self, messages: list[Message]) -> list[Message]:
        """The messages as the template takes them."""
        messages = list(map(_with_parts, messages)) if self._takes_parts else messages
        if any(map(_reasoning, messages)) and self._takes_thinking_parts:
            return list(map(_with_thinking_part, messages))
        return messages

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes contents that are lists of parts, as those of models that see, and no texts."""
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
        return self._needs(messages, list(map(_with_parts, messages)))

    @cached_property
    def _takes_thinking_parts(self) -> bool:
        """Whether the template writes reasoning that is a part of the content alone, as those of Magistral do."""
        question = {"role": "user", "content": "question"}
        answer = {"role": "assistant", "content": "response", REASONING[0]: _PROBE}
        return self._needs([question, answer], [question, _with_thinking_part(answer)])

    def _needs(self, messages: list[Message], in_parts: list[Message]) -> bool:
        """Whether the template writes the probe only if messages have parts, and these not as Python or JSON does."""
        for form in (messages, in_parts):
            try:
                text = self._apply(form, Conversation([])).text
            except Exception:  # noqa: BLE001 (whatever a template raises)
                continue
            if _PROBE in text:
                return form is in_parts and not _KEY.search(text)
        return False

    @cached_property
    def prompts_always(self) -> bool:
        """Whether the template writes a prompt for the assistant at the end of every text, as those of Command A do.

        What it writes after an answer then goes on otherwise if a question follows, and stands after a question, too.
        """
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "response"}
        conversation = Conversation([question, answer, question])
        try:
            asked, answered, whole = (self.write(conversation, num_messages) for num_messages in (1, 2, 3))
            prompt = self.write(conversation, 1, add_generation_prompt=True)
        except SettingsError:
            return False
        rest = answered[self.outside_of_special_tokens(answered, common_length(answered, whole)) :]
        return bool(rest.strip()) and asked.endswith(rest) and prompt.startswith(asked)

    @property
    def eos_token(self) -> str | None:
        """The tokenizer's EOS, as templates write it."""
        return self._special_tokens.get("eos_token")

    def write_marked(self, conversation: Conversation, num_messages: int | None = None) -> SpannedText | None:
        """What `write` returns, with what the template marks in it; None if the template has no marks."""
        if not _MARK.search(self._tokenizer.get_chat_template(tools=conversation.tools)):
            return None
        messages = self._messages(conversation.messages[:num_messages])
        return self._apply(messages, conversation, return_assistant_tokens_mask=True)

    def fitted(self, conversation: Conversation) -> Conversation:
        """The conversation with results of tools, and the arguments of tool calls, as its template takes them."""
        return self._with_fitted_arguments(self._with_named_results(conversation))

    def _with_named_results(self, conversation: Conversation) -> Conversation:
        """The conversation with the role that its template has for a tool's result: `tool`, or OLMo's `environment`."""
        messages = conversation.messages
        if not self._tokenizer.chat_template or not any(each["role"] == "tool" for each in messages):
            return conversation
        template = self._tokenizer.get_chat_template(tools=conversation.tools)
        if _TOOL.search(template) or not _ENVIRONMENT.search(template):
            return conversation
        renamed = [{**each, "role": "environment"} if each["role"] == "tool" else each for each in messages]
        return replace(conversation, messages=renamed)

    def _with_fitted_arguments(self, conversation: Conversation) -> Conversation:
        """The conversation with the arguments of tool calls as objects, or else as JSON text.

        Some templates join the arguments to other text, which fails for an object, or writes it as Python does.
        """
        calls = [call for message in conversation.messages for call in message.get("tool_calls") or ()]
        objects = [arguments for call in calls if isinstance(arguments := call["function"].get("arguments"), Mapping)]
        if not objects:
            return conversation
        as_text = replace(conversation, messages=[_with_arguments_as_text(each) for each in conversation.messages])
        try:
            text = self.write(conversation)
        except SettingsError:
            with suppress(SettingsError):
                self.write(as_text)
                return as_text
            return conversation
        as_python = [str(arguments) for arguments in objects if str(arguments) != json.dumps(arguments)]
        if not any(arguments in text for arguments in as_python):
            return conversation
        # Others than the template may write so: a tool's result, for instance, that repeats the arguments.
        with suppress(SettingsError):
            other_text = self.write(as_text)
            if any(text.count(arguments) > other_text.count(arguments) for arguments in as_python):
                return as_text
        return conversation

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Matches the special tokens of the tokenizer in a text."""
        return special_token_pattern(self._tokenizer)

    def outside_of_special_tokens(self, text: str, position: int) -> int:
        """The position, or where the special token begins that it is within: two may begin with the same characters."""
        tokens = self.special_tokens.finditer(text)
        return next((token.start() for token in tokens if token.start() < position < token.end()), position)


def _with_parts(message: Message) -> Message:
    """The message with its text as a list of one part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _reasoning(message: Message) -> str | None:
    return next(filter(None, map(message.get, REASONING)), None)


def _with_thinking_part(message: Message) -> Message:
    """The message with its reasoning, if it has any, as the first part of its content."""
    if (reasoning := _reasoning(message)) is None:
        return message
    content = message["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    return {**message, "content": [{"type": "thinking", "thinking": reasoning}, *parts]}


def _with_arguments_as_text(message: Message) -> Message:
    calls = [_call_with_text(call) for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls} if calls else message


def _call_with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function.get("arguments"), Mapping):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
