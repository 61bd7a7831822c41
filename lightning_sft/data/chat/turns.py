"""Where the assistant's turns begin and end in the text of a conversation.

Nothing about a chat template is assumed. A turn begins where the template's own generation prompt for it ends, which
must stand in the whole conversation as it is; it ends with the last special token before the template goes on. Where
one of these fails there is an error, never a turn that is nearly right. Marks that a template may have of its own
(`{% generation %}`) are not needed, and not asked.
"""

from dataclasses import dataclass

from lightning_sft.data.chat.chat_template import ChatTemplate
from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.tokens.texts import around
from lightning_sft.errors import SettingsError


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in the text of a conversation.

    Attributes:
        number: Which of the conversation's messages it is, from 1.
        start: Its first character.
        end: The character after the token that ends it.
        content_end: The character after what it says, where the token that ends it begins.
    """

    number: int
    start: int
    end: int
    content_end: int


def find_turn(template: ChatTemplate, conversation: Conversation, index: int, text: str) -> Turn:
    """Find an assistant's turn.

    Args:
        template: What wrote the text.
        conversation: All messages.
        index: Which of them is the turn.
        text: All of the conversation, as the template writes it.

    Raises:
        ValueError: If the turn's start or end cannot be told for certain; the message names the turn.
    """
    start = _find_start(template, conversation, index, text)
    content_end, end = _find_end(template, conversation, index, text, start)
    return Turn(index + 1, start, end, content_end)


def check_has_context(index: int) -> None:
    """Refuse a turn that no message stands before.

    Raises:
        ValueError: If it is the first.
    """
    if index == 0:
        raise SettingsError("turn 1 (assistant) has nothing before it that a model could answer. Remove it.")


def _find_start(template: ChatTemplate, conversation: Conversation, index: int, text: str) -> int:
    """Where the template's generation prompt for the turn ends, which must be how the whole text begins."""
    check_has_context(index)
    prompt = template.write(conversation, index, add_generation_prompt=True)
    if not text.startswith(prompt):
        position = _common_length(prompt, text)
        raise SettingsError(
            f"turn {index + 1} (assistant): to prompt for it the chat template writes {around(prompt, position)!r}, "
            f"but in the whole conversation {around(text, position)!r}: what it writes depends on later turns. "
            f"{_way_out(conversation, index)}"
        )
    return len(prompt)


def _find_end(template: ChatTemplate, conversation: Conversation, index: int, text: str, start: int) -> tuple[int, int]:
    """Start and end of the token that ends the turn: the last special token before the template goes on."""
    closed, continued = text, text  # up to the turn, as a whole conversation and as one that goes on
    if index + 1 < len(conversation.messages):
        closed = template.write(conversation, index + 1)
    special = list(template.special_tokens.finditer(closed, start))
    if closed is text and len(special) > 1 and not text[special[-2].end() : special[-1].start()].strip():
        # Some templates close whole conversations with one more token. A model never gets to write that one.
        continued = template.write(conversation, index + 1, add_generation_prompt=True)
    limit = len(closed) if continued.startswith(closed) else _common_length(closed, continued)
    limit = next((token.start() for token in special if token.start() < limit < token.end()), limit)
    closing = max((token.span() for token in special if token.end() <= limit), default=None)
    is_open = closing is None or bool(closed[closing[1] : limit].strip())
    if template.special_tokens.sub("", closed[limit:]).strip() or (is_open and limit < len(closed)):
        raise SettingsError(
            f"turn {index + 1} (assistant): the chat template writes {around(closed, limit)!r}, but when others "
            f"follow {around(continued, limit)!r}. {_way_out(conversation, index)}"
        )
    if closing is None or is_open:
        raise SettingsError(
            f"turn {index + 1} (assistant): it ends in {closed[max(limit - 20, start) : limit]!r}, in no special "
            "token, so that a model could not learn where to stop. Let it end in one of the tokenizer's "
            "(`tokenizer.add_special_tokens`), or give another `chat_template`."
        )
    return closing


def _way_out(conversation: Conversation, index: int) -> str:
    is_last = all(message["role"] != "assistant" for message in conversation.messages[index + 1 :])
    return "Give another `chat_template`" + ("." if is_last else ', or set `train_on_turns` to "last".')


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    differ = (at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(first), len(second)))
