"""The chat template of a tokenizer: where it comes from, and what it writes."""

import copy
import re
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_type
from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.tokens.texts import read_template_file
from lightning_sft.errors import SettingsError, one_line


def read_chat_template(chat_template: str) -> str:
    """A template's text, given as itself or as the path of a file that holds it.

    Raises:
        FileNotFoundError: If it has no braces, and is no file either.
        TypeError: If it is no string.
        ValueError: If the file is not UTF-8 text.
    """
    check_type("chat_template", chat_template, str, "a text or the path of a file, as a string")
    if "{" in chat_template:
        return chat_template
    way_out = "Give the template's text, or the path of a file with it."
    return read_template_file("chat_template", chat_template, "{{ }}", way_out)


def with_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer with another chat template."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


class ChatTemplate:
    """A tokenizer's chat template, which writes conversations.

    Args:
        tokenizer: Any Hugging Face tokenizer; it needs a chat template by the time that something is written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def write(
        self, conversation: Conversation, num_messages: int | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation.

        Args:
            conversation: The messages, and what else the template is given.
            num_messages: Write the first messages alone, so many. None: all.
            add_generation_prompt: Whether the text ends in what stands before an answer of the assistant.

        Raises:
            ValueError: If there is no template, or it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise SettingsError(
                "the row has messages, but the tokenizer has no chat template. Pass `chat_template`, a text or a file, "
                "or name the columns of a prompt and an output."
            )
        messages = conversation.messages[:num_messages]
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "tools": conversation.tools}
        try:
            return str(self._tokenizer.apply_chat_template(messages, **{**conversation.variables, **options}))
        except Exception as error:  # whatever a template raises
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise SettingsError(f"the chat template refuses the first {len(messages)} messages: {reason}") from error

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """Matches the special tokens of the tokenizer in a text."""
        tokens = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= set(self._tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
