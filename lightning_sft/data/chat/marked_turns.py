"""Which text of the assistant's turns is learnt: all of it, or what a template marks by `{% generation %}`."""

from collections.abc import Sequence

from lightning_sft.data.chat.chat_template import ChatTemplate, SpannedText
from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.chat.turns import Turn
from lightning_sft.errors import SettingsError


def unlearnt_call(conversation: Conversation, turn: Turn, learnt: SpannedText) -> str | None:
    """The function of a turn's first tool call that is written, but not where something is learnt; None without one."""
    for call in conversation.messages[turn.index].get("tool_calls") or ():
        name: str = call["function"]["name"]
        start = turn.text.rfind(name, turn.start)  # calls stand last in nearly all templates
        if start >= 0 and not any(first <= start < end for first, end in learnt.spans):
            return name
    return None


def learnt_text(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[Turn], text: str | None = None
) -> SpannedText:
    """What is learnt of turns.

    What is marked of a turn is learnt with the token that ends the turn, if it reaches up to that.

    Args:
        template: Writes the conversation.
        conversation: All messages.
        turns: The text of each begins with that of the one before.
        text: The whole conversation, if it is to be the text. None: that of the last turn.
    """
    last = turns[-1]
    written = template.write_marked(conversation, last.index + 1 if text is None else None)
    if written is None:
        return SpannedText(last.text if text is None else text, [(turn.start, turn.end) for turn in turns])
    marked = written.spans
    is_end = text is None or last.index + 1 == len(conversation.messages)  # nobody speaks after the last turn
    if text is None:
        after = written.text[last.end - last.moved : marked[-1][1] if marked else 0]
        text = last.text + after  # what is marked may reach beyond the end of the turn, as up to a line break
        marked = [(start + last.moved, end + last.moved) for start, end in marked]
    spans: list[tuple[int, int]] = []
    for turn in turns:
        limit = len(text) if is_end and turn is last else turn.end
        of_turn = [(start, end) for start, end in marked if start < limit and (end > turn.start or start == turn.start)]
        if of_turn:
            start, end = of_turn[-1]  # of an empty turn, too, which has a mark around nothing
            if end <= turn.end and not turn.text[end : turn.content_end].strip():
                of_turn[-1] = (start, turn.end)
        of_turn = [(start, end) for start, end in of_turn if start < end]
        if not of_turn:
            raise SettingsError(
                f"turn {turn.index + 1} (assistant): the chat template marks no part of it with `{{% generation %}}`. "
                "Give another `chat_template`, or give the turn the `weight` 0."
            )
        for start, end in of_turn:
            is_next = spans and spans[-1][1] == start
            spans[-1:] = [(spans[-1][0], end)] if is_next else [*spans[-1:], (start, end)]
    return SpannedText(text, spans)
