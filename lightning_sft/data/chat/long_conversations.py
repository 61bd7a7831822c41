"""The turns of long conversations, found in a time that grows with their length, not with its square.

Writing a conversation up to each of its turns takes a time that grows with the square of their number. Here each turn
is written at the end of a short conversation instead: the system's words, the exchange with the turn before, and its
own. What stands before one turn after another must be the whole conversation, character by character, but for the end
of a prompt (an opened `<think>`) that is not there any more once others follow; and some turns are written in full,
which must give the same. If anything differs, all turns are written in full.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from lightning_sft.data.chat.chat_template import ChatTemplate
from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.chat.turns import Turn, short_conversation, write_turn
from lightning_sft.data.tokens.texts import common_length

_NUM_WRITTEN_IN_FULL = 16  # a conversation of no more turns has all of them written in full


def write_turns(template: ChatTemplate, conversation: Conversation, indices: Sequence[int], text: str) -> list[Turn]:
    """Write a conversation, whose whole `text` is known, up to each turn that is learnt, by `indices` ascending."""
    if len(indices) > _NUM_WRITTEN_IN_FULL:
        turns = _from_short_conversations(template, conversation, indices, text)
        if turns is not None:
            return turns
    return [write_turn(template, conversation, index, text) for index in indices]


def _from_short_conversations(
    template: ChatTemplate, conversation: Conversation, indices: Sequence[int], text: str
) -> list[Turn] | None:
    """The turns; None if short conversations do not show them as they are in the whole text."""
    in_full = {index: write_turn(template, conversation, index, text) for index in _written_in_full(indices)}
    last = in_full[indices[0]]
    if last.moved:
        return None
    num_kept = common_length(last.context, text)  # of what stands before the last turn, once others follow
    turns = [last]
    for previous, index in pairwise(indices):
        short = short_conversation(conversation, previous)
        offset = len(conversation.messages) - len(short.messages)
        before, turn = (write_turn(template, short, each - offset) for each in (previous, index))
        num_kept_in_short = common_length(before.context, turn.context)
        is_alike = (before.prompt, before.response) == (before.context + last.prompt[last.start :], last.response)
        if before.moved or turn.moved or not is_alike:
            return None
        if before.context[num_kept_in_short:] != last.context[num_kept:]:
            return None
        context = text[:num_kept] + turn.context[num_kept_in_short:]
        num_kept, start = common_length(context, text), len(context)
        last = replace(
            turn,
            index=index,
            prompt=context + turn.prompt[turn.start :],
            text=context + turn.response,
            start=start,
            content_end=start + turn.content_end - turn.start,
            words_end=turn.words_end and start + turn.words_end - turn.start,
        )
        if in_full.get(index, last) != last:
            return None
        turns.append(last)
    return turns


def _written_in_full(indices: Sequence[int]) -> Iterator[int]:
    """The first turns and the last, and those after half of them, a quarter, an eighth and so on."""
    yield from indices[: _NUM_WRITTEN_IN_FULL // 2]
    yield from indices[-2:]
    position = len(indices) // 2
    while position:
        yield indices[position]
        position //= 2
