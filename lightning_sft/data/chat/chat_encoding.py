"""From conversations to token ids: written by the chat template, with the assistant's turns as the response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_template import ChatTemplate
from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.chat.turns import Turn, check_has_context, find_turn
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.texts import check_is_text
from lightning_sft.errors import SettingsError

TrainOnTurns = Literal["all", "last"]


@dataclass(frozen=True)
class WrittenConversation:
    """A conversation as its template writes it.

    Attributes:
        text: All of it.
        turns: The assistant's turns to learn from, at least one.
        last_content: The content of the last of these, as the row has it.
    """

    text: str
    turns: list[Turn]
    last_content: str

    @property
    def prompt(self) -> str:
        """The text up to the last turn to learn from, generation prompt included."""
        return self.text[: self.turns[-1].start]

    @property
    def output(self) -> str:
        """The last turn to learn from, without the token that ends it."""
        return self.text[self.turns[-1].start : self.turns[-1].content_end]

    @property
    def answer(self) -> str:
        """What the last turn to learn from says, without what the template adds; `output` if that is nothing."""
        return self.last_content or self.output


class ChatEncoder:
    """Writes conversations with a tokenizer's chat template, and tokenises them.

    Args:
        tokenizer: Any Hugging Face tokenizer; it needs a chat template by the time that something is written.
        train_on_turns: Which of the assistant's turns are the response: all, or the last one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on_turns: TrainOnTurns = "all") -> None:
        self._tokenizer, self._train_on_turns = tokenizer, train_on_turns
        self._template = ChatTemplate(tokenizer)

    def write(self, conversation: Conversation) -> WrittenConversation:
        """The whole conversation, with the turns to learn from.

        Raises:
            ValueError: If there is no turn to learn from, the template refuses the conversation, or a turn's start and
                end cannot be told for certain; the message names the turn.
        """
        indices = self._learnt_turns(conversation)
        text = self._template.write(conversation)
        check_is_text("the conversation", text)
        turns = [find_turn(self._template, conversation, index, text) for index in indices]
        return WrittenConversation(text, turns, conversation.messages[indices[-1]]["content"])

    def write_prompt(self, conversation: Conversation) -> tuple[str, str | None]:
        """The text for the model to go on from, and what an assistant's turn at the end says (None if there is none).

        Raises:
            ValueError: If the template refuses the conversation.
        """
        final, num_before = conversation.messages[-1], len(conversation.messages) - 1
        if final["role"] != "assistant":
            return self._template.write(conversation, add_generation_prompt=True), None
        check_has_context(num_before)
        return self._template.write(conversation, num_before, add_generation_prompt=True), final["content"]

    def _learnt_turns(self, conversation: Conversation) -> list[int]:
        """Which of the messages are learnt, at least one."""
        messages, num_prompt = conversation.messages, conversation.num_prompt_messages
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [index for index in turns if index >= num_prompt]
        if self._train_on_turns == "last":
            answers = answers[-1:]
        learnt = [index for index in answers if messages[index].get("weight") != 0]
        if learnt:
            return learnt
        if answers and self._train_on_turns == "last":
            raise SettingsError(
                f"turn {answers[0] + 1} (assistant), the last one, has the `weight` 0, but `train_on_turns` is "
                '"last". Remove the turn, or set `train_on_turns` to "all".'
            )
        if answers:
            raise SettingsError(f"all {len(answers)} turns of the assistant have the `weight` 0. Remove the row.")
        if turns:
            raise SettingsError(
                f"no turn of the assistant to learn from: all {len(messages)} messages are in `prompt_field`, and a "
                "prompt is not learnt. Rename a column of whole conversations to `messages`, and leave out "
                "`prompt_field`."
            )
        raise SettingsError(f"no turn of the assistant to learn from among {len(messages)} messages. Remove the row.")

    def encode(self, written: Sequence[WrittenConversation]) -> Iterator[Example]:
        """Token ids of each text, exactly those that `apply_chat_template` gives, with the turns as response.

        Each turn must begin and end between two tokens. That is so if the text, cut there, has the same tokens piece by
        piece. Some tokenizers put a mark before each piece; then the text up to each cut must have the tokens with
        which the whole begins.

        Raises:
            ValueError: If a turn begins or ends within a token; the message names the turn.
        """
        cuts = [[0, *chain(*((turn.start, turn.end) for turn in each.turns)), len(each.text)] for each in written]
        pieces = [each.text[start:end] for each, cut in zip(written, cuts, strict=True) for start, end in pairwise(cut)]
        piece_ids = iter(self._ids(pieces))
        for each, cut, ids in zip(written, cuts, self._ids([each.text for each in written]), strict=True):
            apart = [next(piece_ids) for _ in pairwise(cut)]
            is_same = list(chain(*apart)) == ids
            first, *rest = accumulate(map(len, apart[:-1])) if is_same else self._bounds(each, ids)
            excluded_spans = [*rest, len(ids)] if rest[-1] < len(ids) else rest[:-1]
            yield Example(input_ids=ids, num_prompt_tokens=first, excluded_spans=excluded_spans)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _bounds(self, written: WrittenConversation, ids: list[int]) -> list[int]:
        """The turns' bounds in tokens: how many tokens the text up to each bound has."""
        bounds = []
        for turn in written.turns:
            for position, side in ((turn.start, "begins"), (turn.end, "ends")):
                (before,) = self._ids([written.text[:position]])
                if ids[: len(before)] != before:
                    raise SettingsError(
                        f"turn {turn.number} (assistant) {side} within a token, between "
                        f"{written.text[max(position - 20, 0) : position]!r} and "
                        f"{written.text[position : position + 20]!r}. Give another `chat_template`."
                    )
                bounds.append(len(before))
        return bounds


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn; None where there is no such thing."""
    encoder = ChatEncoder(tokenizer)
    example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        (encoded,) = encoder.encode([encoder.write(Conversation(example))])
    except SettingsError:  # no template, or one for other conversations: nothing was learnt with it
        return None
    return encoded.input_ids[min([*encoded.excluded_spans, len(encoded.input_ids)]) - 1]
