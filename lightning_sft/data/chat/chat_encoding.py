"""From conversations to token ids: written by the chat template, with the assistant's turns as the response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise, takewhile
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_template import ChatTemplate
from lightning_sft.data.chat.conversation import Conversation, Message
from lightning_sft.data.chat.long_conversations import write_turns
from lightning_sft.data.chat.marked_turns import learnt_text
from lightning_sft.data.chat.notices import Notice
from lightning_sft.data.chat.turns import Turn, check_has_context
from lightning_sft.data.chat.unwritten import check_is_written, check_tools_are_written
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.texts import around, check_is_text
from lightning_sft.errors import SettingsError

TrainOnTurns = Literal["all", "last"]


@dataclass(frozen=True)
class WrittenExample:
    """A conversation, or the beginning of one, as its template writes it.

    Attributes:
        text: All of it.
        turns: The assistant's turns to learn from, at least one.
        spans: Start and end of each text that is learnt.
        last_content: The content of the last of the turns, as the row has it.
        is_whole: Whether this is the whole conversation, not one of several examples that it becomes.
        notices: What a user is to know of it.
    """

    text: str
    turns: Sequence[Turn]
    spans: Sequence[tuple[int, int]]
    last_content: str
    is_whole: bool
    notices: Sequence[Notice] = ()

    @property
    def prompt(self) -> str:
        """The text up to the last turn to learn from, generation prompt included."""
        return self.turns[-1].prompt

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
        append_eos: Whether a turn that the template ends in no special token ends in EOS.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on_turns: TrainOnTurns = "all", append_eos: bool = True
    ) -> None:
        self._tokenizer, self._train_on_turns, self._append_eos = tokenizer, train_on_turns, append_eos
        self._template = ChatTemplate(tokenizer)

    def write(self, conversation: Conversation) -> list[WrittenExample]:
        """What a model learns from a conversation.

        That is the whole conversation with all turns to learn from, if each of them stands there as it does when a
        model is asked for it. Otherwise each turn is an example of its own, with what stands before it then.

        Raises:
            SettingsError: If there is no turn to learn from, the template refuses the conversation or does not write
                all of a turn, or a turn's start and end cannot be told for certain; the message names the turn.
        """
        indices = self._learnt_turns(conversation)
        conversation = self._template.fitted(conversation)
        text = self._template.write(conversation)
        check_is_text("the conversation", text)
        turns = write_turns(self._template, conversation, indices, text)
        left_out = [check_is_written(self._template, conversation, turn) for turn in turns]
        check_tools_are_written(self._template, conversation, text)
        if all(turn.is_closed and text.startswith(turn.text) for turn in turns):
            return [self._example(conversation, turns, left_out, text)]
        examples = [
            self._example(conversation, [turn], [reasoning], None)
            for turn, reasoning in zip(turns, left_out, strict=True)
        ]
        return [replace(example, is_whole=len(examples) == 1) for example in examples]

    def write_prompt(self, conversation: Conversation) -> tuple[str, str | None]:
        """The text for the model to go on from, and what an assistant's turn at the end says (None if there is none).

        Raises:
            SettingsError: If the template refuses the conversation.
        """
        conversation = self._template.fitted(conversation)
        final, num_before = conversation.messages[-1], len(conversation.messages) - 1
        if final["role"] != "assistant":
            return self._template.write(conversation, add_generation_prompt=True), None
        check_has_context(num_before)
        return self._template.write(conversation, num_before, add_generation_prompt=True), final["content"]

    def _example(
        self, conversation: Conversation, turns: Sequence[Turn], left_out: Sequence[str], text: str | None
    ) -> WrittenExample:
        learnt = learnt_text(self._template, conversation, turns, text)
        notices = [Notice.of_reasoning(reasoning) for reasoning in left_out if reasoning]
        if self._append_eos and not turns[-1].is_closed:
            notices.append(Notice.of_end(learnt.text))
        content = conversation.messages[turns[-1].index]["content"]
        return WrittenExample(learnt.text, turns, learnt.spans, content, is_whole=text is not None, notices=notices)

    def _learnt_turns(self, conversation: Conversation) -> list[int]:
        """Which of the messages are learnt, at least one."""
        messages, num_prompt = conversation.messages, conversation.num_prompt_messages
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [index for index in turns if index >= num_prompt]
        begins = next((index for index, message in enumerate(messages) if not _is_system(message)), 0)
        if answers[:1] == [begins] and len(answers) > 1:  # nobody has asked for this one
            answers = answers[1:]
        if self._train_on_turns == "last":
            answers = answers[-1:]
        learnt = [index for index in answers if messages[index].get("weight") != 0]
        if learnt:
            return learnt
        if answers and self._train_on_turns == "last":
            raise SettingsError(
                f"turn {answers[0] + 1} (assistant), the last one, has the `weight` 0 (or `train` false, or the like), "
                'but `train_on_turns` is "last". Remove the turn, or set `train_on_turns` to "all".'
            )
        if answers:
            raise SettingsError(
                f"all {len(answers)} turns of the assistant have the `weight` 0 (or `train` false, or the like). "
                "Remove the row."
            )
        if turns:
            raise SettingsError(
                f"no turn of the assistant to learn from: all {len(messages)} messages are in `prompt_field`, and a "
                "prompt is not learnt. Rename a column of whole conversations to `messages`, and leave out "
                "`prompt_field`."
            )
        raise SettingsError(f"no turn of the assistant to learn from among {len(messages)} messages. Remove the row.")

    def encode(self, written: Sequence[WrittenExample]) -> Iterator["EncodedConversation"]:
        """Token ids of each text, exactly those that `apply_chat_template` gives, with what is learnt as the response.

        Each stretch that is learnt must begin and end between two tokens. That is so if the text, cut there, has the
        same tokens piece by piece. Some tokenizers put a mark before each piece; and some join the end of a generation
        prompt to the turn in one token. Then the text up to each cut is tokenised as well.

        Raises:
            SettingsError: If a turn begins or ends within a token; the message names the turn.
        """
        cuts = [[0, *chain(*each.spans), len(each.text)] for each in written]
        pieces = [each.text[start:end] for each, cut in zip(written, cuts, strict=True) for start, end in pairwise(cut)]
        piece_ids = iter(self._ids(pieces))
        for each, cut, ids in zip(written, cuts, self._ids([each.text for each in written]), strict=True):
            apart = [next(piece_ids) for _ in pairwise(cut)]
            notices = list(each.notices)
            if all(turn.text.startswith(turn.prompt) for turn in each.turns) and list(chain(*apart)) == ids:
                bounds = list(accumulate(map(len, apart[:-1])))
            else:
                bounds, more = self._bounds(each, ids)
                notices += more
            if not each.turns[-1].is_closed and self._append_eos:
                ids = [*ids, self._eos_token_id()]
                bounds[-1] = len(ids)
            first, *rest = bounds
            excluded_spans = [*rest, len(ids)] if rest[-1] < len(ids) else rest[:-1]
            yield EncodedConversation(Example(ids, first, excluded_spans), notices)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _eos_token_id(self) -> int:
        eos_token_id: int | None = self._tokenizer.eos_token_id
        if eos_token_id is None:
            raise SettingsError(
                "the chat template ends a turn that is learnt in no special token, and the tokenizer has no EOS that "
                "could end it. Set `tokenizer.eos_token`, or pass `append_eos=False` (the model then never learns to "
                "stop)."
            )
        return eos_token_id

    def _bounds(self, written: WrittenExample, ids: list[int]) -> tuple[list[int], list[Notice]]:
        """Where stretches that are learnt begin and end in tokens; and prompts that are not written before a turn."""
        bounds, notices = [], []
        turns = {turn.start: turn for turn in written.turns}
        for start, end in written.spans:
            if start in turns:
                first, notice = self._first_token(turns[start], ids)
                notices += [notice] if notice else []
            else:
                first = self._num_shared(written.text[:start], ids)
            (before_end,) = self._ids([written.text[:end]])
            if ids[: len(before_end)] != before_end:
                raise SettingsError(
                    f"what is learnt of the assistant's turns ends within a token, in {around(written.text, end)!r}. "
                    "Give another `chat_template`."
                )
            bounds += [first, len(before_end)]
        return bounds, notices

    def _first_token(self, turn: Turn, ids: list[int]) -> tuple[int, Notice | None]:
        """The turn's first token: the one after all that the prompt and the text share."""
        (prompt_ids,) = self._ids([turn.prompt])
        shared = _num_alike(prompt_ids, ids)
        if shared == len(prompt_ids):
            return shared, None
        if shared < self._num_shared(turn.prompt[: turn.words_end], ids):
            raise SettingsError(
                f"turn {turn.index + 1} (assistant) begins within a token, in {around(turn.text, turn.start)!r}. "
                "Give another `chat_template`."
            )
        return shared, Notice.of_prompt(turn.prompt, turn.text, turn.start)

    def _num_shared(self, text: str, ids: list[int]) -> int:
        """With how many of the tokens of a text others begin."""
        (own,) = self._ids([text])
        return _num_alike(own, ids)


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as token ids.

    Attributes:
        example: The tokens, and which are learnt.
        notices: What a user is to know of it.
    """

    example: Example
    notices: Sequence[Notice]


def _num_alike(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn; None where there is no such thing."""
    encoder = ChatEncoder(tokenizer, append_eos=False)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        (written,) = encoder.write(Conversation(messages))
        (encoded,) = encoder.encode([written])
    except SettingsError:  # no template, or one for other conversations: nothing was learnt with it
        return None
    if not written.turns[-1].is_closed:
        return None
    example = encoded.example
    return int(example.input_ids[min([*example.excluded_spans, len(example.input_ids)]) - 1])
