"""The assistant's turns as a chat template writes them: what stands before a turn, how it ends, what of it is learnt.

Nothing about a chat template is assumed. What stands before a turn is the template's own generation prompt for it. The
turn itself is what the template writes after that when the conversation ends with the turn, up to the token that ends
it. Where one of these cannot be told there is an error, never a turn that is nearly right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_sft.data.chat.chat_template import ChatTemplate, SpannedText
from lightning_sft.data.chat.conversation import SYSTEM_ROLES, Conversation
from lightning_sft.data.tokens.texts import around, common_length
from lightning_sft.errors import SettingsError

_NO_WORDS = ("role", "id", "tool_call_id", "type")  # of a message and its calls


@dataclass(frozen=True)
class Turn:
    """An assistant's turn, at the end of the conversation up to it.

    Attributes:
        index: Which of the conversation's messages it is, from 0.
        prompt: What the template writes to prompt a model for the turn.
        text: The conversation from its beginning to the end of the turn.
        start: Where the turn begins in the text. What stands before it is the prompt; or where the template never
            writes some end of the prompt (an opened `<think>`) before such a turn, the prompt without that.
        content_end: Where the token that ends the turn begins; the end of the text if there is none.
        moved: How many characters later the turn stands in the text than in what the template writes, since what it
            writes before the turn is shorter than the prompt (or longer, if this is negative).
        words_end: The last place in the prompt where the words of the message before the turn can end; 0 if there are
            none, or they are written otherwise.
    """

    index: int
    prompt: str
    text: str
    start: int
    content_end: int
    moved: int
    words_end: int

    @property
    def end(self) -> int:
        """Where the turn ends in the text."""
        return len(self.text)

    @property
    def context(self) -> str:
        """What stands before the turn."""
        return self.text[: self.start]

    @property
    def response(self) -> str:
        """The turn itself, with the token that ends it."""
        return self.text[self.start :]

    @property
    def is_closed(self) -> bool:
        """Whether a special token ends the turn."""
        return self.content_end < self.end


def write_turn(template: ChatTemplate, conversation: Conversation, index: int, text: str | None = None) -> Turn:
    """Write a conversation up to one of the assistant's turns; `text` is the whole of it, if it is written already."""
    check_has_context(index)
    prompt = template.write(conversation, index, add_generation_prompt=True)
    is_last = index + 1 == len(conversation.messages)
    whole = text if text is not None and is_last else template.write(conversation, index + 1)
    context, start = prompt, len(prompt)
    words = conversation.messages[index - 1]["content"].strip()
    words_end = prompt.rfind(words) + len(words) if words and words in prompt else 0
    if not whole.startswith(prompt):
        words_end = _find_words_end(template, conversation, index, prompt)
        prompt_start = max(words_end, common_length(template.write(conversation, index), prompt))
        if words_end and prompt_start == len(prompt):  # no generation prompt: the end of the message before asks for it
            prompt_start = words_end
        start = template.outside_of_special_tokens(whole, common_length(prompt, whole))
        if start < prompt_start:
            start, shared = _find_start(template, conversation, index, prompt[prompt_start:], whole)
            context = prompt[: prompt_start + shared]
        else:
            context = prompt[:start]
    content_end, end = _find_end(template, conversation, index, whole, start)
    moved = len(context) - start
    return Turn(index, prompt, context + whole[start:end], len(context), content_end + moved, moved, words_end)


def check_has_context(index: int) -> None:
    """Refuse a turn that no message stands before."""
    if index == 0:
        raise SettingsError(
            "turn 1 (assistant) has nothing before it that a model could answer. Remove it; a text that is to be "
            "learnt as a whole belongs in the column `text`."
        )


def _find_words_end(template: ChatTemplate, conversation: Conversation, index: int, prompt: str) -> int:
    """Where the words of the message before a turn end: what follows is the same if they go on; 0 if all is."""
    *before, last = conversation.messages[:index]
    more = "," if last["content"].rstrip().endswith(".") else "."
    messages = [*before, {**last, "content": last["content"] + more}]
    other = template.write(replace(conversation, messages=messages), add_generation_prompt=True)
    return len(prompt) - common_length(prompt[::-1], other[::-1])


def _find_start(
    template: ChatTemplate, conversation: Conversation, index: int, generation_prompt: str, whole: str
) -> tuple[int, int]:
    """Where a turn begins, if the template writes earlier turns otherwise once this one is there.

    That is after the generation prompt, or as much of it as is written, which stands last before the turn's own words;
    where there is none, after what ends the message before the turn, such as Mistral's `[/INST]`.
    What follows must be the same whatever the messages before the turn say, so that nothing of them is learnt.

    Returns:
        Where the turn begins in the whole text; and how many characters of the generation prompt stand before it.
    """
    before, turn = conversation.messages[:index], conversation.messages[index]
    words_start = common_length(whole, template.write(replace(conversation, messages=[*before, _reworded(turn)])))
    empty = [{key: value for key, value in message.items() if not value} for message in before]  # and stays so
    reworded_before = [{**_reworded(message), **rest} for message, rest in zip(before, empty, strict=True)]
    reworded = template.write(replace(conversation, messages=[*reworded_before, turn]))
    marker = template.special_tokens.match(generation_prompt)
    for shared in range(len(generation_prompt), marker.end() - 1 if marker else len(generation_prompt) - 1, -1):
        found = whole.rfind(generation_prompt[:shared], 0, words_start) if shared else -1
        if found >= 0 and reworded.endswith(whole[found:]):
            return found + shared, shared
    raise SettingsError(
        f"turn {index + 1} (assistant): the chat template prompts for it with {generation_prompt!r}, but the text "
        f"before the turn is different: {around(whole, words_start)!r}. Give another `chat_template`, or give the turn "
        "the `weight` 0."
    )


def _find_end(
    template: ChatTemplate, conversation: Conversation, index: int, whole: str, start: int
) -> tuple[int, int]:
    """Start and end of the token that ends the turn; both the end of the turn's words if no special token does."""
    if template.prompts_always:
        return _find_eos(template, conversation, index, whole, start)
    tokens = [match.span() for match in template.special_tokens.finditer(whole, start)]
    turn = conversation.messages[index]
    if not tokens or whole[tokens[-1][1] :].strip():
        end, content = max(len(whole.rstrip()), start), turn["content"]
        end += common_length(whole[end:], content[len(content.rstrip()) :])  # the turn's own space, not the template's
        return end, end
    if len(tokens) == 1 or whole[tokens[-2][1] : tokens[-1][0]].strip():
        return tokens[-1]
    # Several tokens end the text. Some templates close whole conversations with one more token, which a model that is
    # asked for a turn never gets to write.
    if not turn["content"] and not turn.get("tool_calls"):  # the first of them may also begin the turn
        messages = [*conversation.messages[:index], {**turn, "content": "a"}]
        with_words = template.write(replace(conversation, messages=messages))
        closing = _find_end(template, replace(conversation, messages=messages), index, with_words, start)
        return closing[0] + len(whole) - len(with_words), closing[1] + len(whole) - len(with_words)
    limit = common_length(whole, template.write(conversation, index + 1, add_generation_prompt=True))
    return next((token for token in reversed(tokens) if token[1] <= limit), tokens[-1])


def _find_eos(
    template: ChatTemplate, conversation: Conversation, index: int, whole: str, start: int
) -> tuple[int, int]:
    """Start and end of the EOS of a turn after which the template prompts for another."""
    eos = template.eos_token
    content_end = whole.rfind(eos, start) if eos else -1
    end = content_end + len(eos or "")
    if content_end < 0 or not template.write(conversation, index).endswith(whole[end:]):
        raise SettingsError(
            f"turn {index + 1} (assistant): the chat template always writes its generation prompt, also after the "
            f"turn, and no EOS ({eos!r}) before that, so that the turn's end cannot be told: {whole[start:][-40:]!r}. "
            "Give a `chat_template` that writes the prompt only if `add_generation_prompt` is true, or set "
            "`tokenizer.eos_token` to the token that ends a turn."
        )
    return content_end, end


def _reworded(value: Any) -> Any:
    """A message with other words in it, but the same ids of calls: templates may want them of a certain length."""
    if isinstance(value, str):
        return ("b" if value.lstrip().startswith("a") else "a") + value
    if isinstance(value, dict):
        return {key: item if key in _NO_WORDS else _reworded(item) for key, item in value.items()}
    return [_reworded(item) for item in value] if isinstance(value, list) else value


def short_conversation(conversation: Conversation, index: int) -> Conversation:
    """The system's words, and all from the last question before a turn on."""
    messages = conversation.messages
    roles = [message["role"] for message in messages[: index + 1]]
    first = next((number for number, role in enumerate(roles) if role not in SYSTEM_ROLES), 0)
    question = next((number for number in range(index, first, -1) if roles[number] == "user"), first)
    return replace(conversation, messages=[*messages[:first], *messages[question:]])


def learnt_text(
    template: ChatTemplate, conversation: Conversation, turns: Sequence[Turn], text: str | None = None
) -> SpannedText:
    """What is learnt of turns: all of them, or what the template marks by `{% generation %}`.

    What is marked of a turn is learnt with the token that ends the turn, if it reaches up to that. The text of each
    turn begins with that of the one before. `text` is that of the whole conversation; None: the last turn is the end.
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
            if spans and spans[-1][1] == start:
                start, _ = spans.pop()
            spans.append((start, end))
    return SpannedText(text, spans)


def unlearnt_call(conversation: Conversation, turn: Turn, learnt: SpannedText) -> str | None:
    """The name of the first function that a turn calls where nothing is learnt; None if there is no such call."""
    for call in conversation.messages[turn.index].get("tool_calls") or ():
        name: str = call["function"]["name"]
        start = turn.text.rfind(name, turn.start)  # calls stand last in nearly all templates
        if start >= 0 and not any(first <= start < end for first, end in learnt.spans):
            return name
    return None
