"""From conversations to token ids: written by the chat template, with the assistant's turns as the response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_template import ChatTemplate
from lightning_sft.data.chat.conversation import SYSTEM_ROLES, Conversation
from lightning_sft.data.chat.long_conversations import write_turns
from lightning_sft.data.chat.notices import Notice
from lightning_sft.data.chat.token_counter import CountedText, TokenCounter
from lightning_sft.data.chat.turns import Turn, check_has_context, learnt_text, unlearnt_call
from lightning_sft.data.chat.unwritten import check_is_written, check_tools_are_written, unwritten_message
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.texts import around, check_is_text
from lightning_sft.data.tokens.tokenization import token_ids
from lightning_sft.errors import SettingsError, counted

TrainOnTurns = Literal["all", "last"]


@dataclass(frozen=True)
class WrittenExample:
    """A conversation, or the beginning of one, as its template writes it.

    Attributes:
        text: All of it.
        turns: The assistant's turns to learn from, at least one.
        spans: Start and end of each text that is learnt.
        last_content: The content of the last of the turns, as the row has it.
        longest: The text of the row's last example, which is the longest. What both begin with is tokenised once.
        is_whole: Whether this is the whole conversation, not one of several examples that it becomes.
        has_unlearnt_turns: Whether the row says of a turn that it is not learnt.
        notices: What a user is to know of it.
    """

    text: str
    turns: Sequence[Turn]
    spans: Sequence[tuple[int, int]]
    last_content: str
    longest: str
    is_whole: bool
    has_unlearnt_turns: bool
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
        self._template, self._counter = ChatTemplate(tokenizer), TokenCounter(tokenizer)

    def write(self, conversation: Conversation) -> list[WrittenExample]:
        """What a model learns from a conversation.

        That is the whole conversation with all turns to learn from, if each of them stands there as it does when a
        model is asked for it. Otherwise each turn is an example of its own, with what stands before it then.
        """
        indices = self._learnt_turns(conversation)
        conversation = self._template.fitted(conversation)
        text = self._template.write(conversation)
        check_is_text("the conversation", text)
        turns = write_turns(self._template, conversation, indices, text)
        left_out = [check_is_written(self._template, conversation, turn) for turn in turns]
        check_tools_are_written(self._template, conversation, text)
        *first, last = self._examples(conversation, turns, left_out, text)
        lost = unwritten_message(self._template, conversation, turns, text)
        if lost is not None:
            notice = Notice("context", f"{lost['content'][:40]!r} ({lost['role']})")
            last = replace(last, notices=[*last.notices, notice])
        return [*first, last]

    def _examples(
        self, conversation: Conversation, turns: Sequence[Turn], left_out: Sequence[str], text: str
    ) -> list[WrittenExample]:
        """The whole conversation as an example, or one for each turn."""
        if all(turn.is_closed and text.startswith(turn.text) for turn in turns):
            return [self._example(conversation, turns, left_out, text)]
        examples = [
            self._example(conversation, [turn], [reasoning], None)
            for turn, reasoning in zip(turns, left_out, strict=True)
        ]
        longest = examples[-1].text
        return [replace(example, longest=longest, is_whole=len(examples) == 1) for example in examples]

    def _example(
        self, conversation: Conversation, turns: Sequence[Turn], left_out: Sequence[str], text: str | None
    ) -> WrittenExample:
        learnt = learnt_text(self._template, conversation, turns, text)
        notices = [Notice("reasoning", repr(reasoning[:40])) for reasoning in left_out if reasoning]
        calls = [unlearnt_call(conversation, turn, learnt) for turn in turns]
        notices += [Notice("call", f"`{name}`") for name in calls if name is not None]
        if self._append_eos and not turns[-1].is_closed:
            notices.append(Notice("end", repr(learnt.text[-20:])))
        content = conversation.messages[turns[-1].index]["content"]
        unlearnt = any(message.get("weight") == 0 for message in conversation.messages)
        return WrittenExample(
            learnt.text, turns, learnt.spans, content, learnt.text, text is not None, unlearnt, notices
        )

    def _learnt_turns(self, conversation: Conversation) -> list[int]:
        """Which of the messages are learnt, at least one."""
        messages, num_prompt = conversation.messages, conversation.num_prompt_messages
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [index for index in turns if index >= num_prompt]
        begins = next((index for index, message in enumerate(messages) if message["role"] not in SYSTEM_ROLES), 0)
        if answers[:1] == [begins] and len(answers) > 1:  # nobody has asked for this one
            answers = answers[1:]
        if self._train_on_turns == "last":
            answers = answers[-1:]
        learnt = [index for index in answers if messages[index].get("weight") != 0]
        if learnt:
            return learnt
        if answers and self._train_on_turns == "last":
            raise SettingsError(
                f"turn {answers[0] + 1} (assistant), the last one, has the `weight` 0 (or `train` false, or similar), "
                'but `train_on_turns` is "last". Remove the turn, or set `train_on_turns` to "all".'
            )
        if answers:
            raise SettingsError(
                "no turn of the assistant to learn from: each has the `weight` 0 (or `train` false, or similar). "
                "Remove the row."
            )
        if turns:
            raise SettingsError(
                f"no turn of the assistant to learn from: all {len(messages)} messages are in `prompt_field`, and a "
                "prompt is not learnt. Rename a column of whole conversations to `messages`, and leave out "
                "`prompt_field`."
            )
        raise SettingsError(
            f"no turn of the assistant to learn from among {counted(len(messages), 'message')}. Remove the row."
        )

    def write_prompt(self, conversation: Conversation) -> tuple[str, str | None]:
        """The text for the model to go on from, and what an assistant's turn at the end says, if it says anything."""
        conversation = self._template.fitted(conversation)
        final, num_before = conversation.messages[-1], len(conversation.messages) - 1
        if final["role"] != "assistant":
            return self._template.write(conversation, add_generation_prompt=True), None
        check_has_context(num_before)
        return self._template.write(conversation, num_before, add_generation_prompt=True), final["content"] or None

    def encode(self, written: Sequence[WrittenExample]) -> Iterator["EncodedConversation | SettingsError"]:
        """Token ids of each text, exactly those that `apply_chat_template` gives, with what is learnt as the response.

        What stands before a response has the same tokens as it has alone, when a model is asked for the response; where
        the end of a generation prompt and the turn share a token, the response begins with that one. An example of
        which this cannot be true has an error in its place.
        """
        longest = list(dict.fromkeys(each.longest for each in written))
        all_ids = token_ids(longest, self._tokenizer)
        texts = {text: self._counter.count(text, ids) for text, ids in zip(longest, all_ids, strict=True)}
        for each in written:
            text = texts[each.longest]
            if each.text != each.longest:
                text = self._counter.count(each.text, text.ids_of(each.text))
            try:
                yield self._encoded(each, text)
            except SettingsError as error:
                yield error

    def _encoded(self, written: WrittenExample, text: CountedText) -> "EncodedConversation":
        notices, bounds, ids = list(written.notices), [], text.ids
        turns = {turn.start: turn for turn in written.turns}
        for start, end in written.spans:
            turn = turns.get(start)
            before = text.alike(written.text[:start] if turn is None else turn.prompt)
            if turn is not None and not before.is_whole:
                words, begins = text.alike(turn.prompt[: turn.words_end]), repr(around(turn.text, turn.start))
                if before.num_tokens < words.num_tokens + (not words.is_whole):
                    raise SettingsError(
                        f"turn {turn.index + 1} (assistant) begins within a token that ends the message before it, in "
                        f"{begins}. Give a `chat_template` that writes more between them, and does so if "
                        "`add_generation_prompt` is true."
                    )
                if turn.text.startswith(turn.prompt):
                    notices.append(Notice("token", begins))
                else:
                    prompt_end = turn.prompt[max(turn.start - 20, 0) :]
                    notices.append(Notice("prompt", f"{prompt_end!r}, but before this turn {begins}"))
            until = text.alike(written.text[:end])
            if not until.is_whole:
                raise SettingsError(
                    f"what is learnt of the assistant's turns ends within a token, in {around(written.text, end)!r}. "
                    "Give another `chat_template`."
                )
            bounds += [before.num_tokens, until.num_tokens]
        if not written.turns[-1].is_closed and self._append_eos:
            ids = [*ids, self._eos_token_id()]
            bounds[-1] = len(ids)
        first, *rest = bounds
        excluded_spans = [*rest, len(ids)] if rest[-1] < len(ids) else rest[:-1]
        return EncodedConversation(Example(ids, first, excluded_spans), notices)

    def _eos_token_id(self) -> int:
        eos_token_id: int | None = self._tokenizer.eos_token_id
        if eos_token_id is None:
            raise SettingsError(
                "the chat template ends a turn that is learnt without a special token, and the tokenizer has no EOS "
                "that could end it. Set `tokenizer.eos_token`, or pass `append_eos=False` (the model then never learns "
                "to stop)."
            )
        return eos_token_id


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as token ids, and what a user is to know of it."""

    example: Example
    notices: Sequence[Notice]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn; None where there is no such thing."""
    encoder = ChatEncoder(tokenizer, append_eos=False)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        (written,) = encoder.write(Conversation(messages))
    except SettingsError:  # no template, or one for other conversations: nothing was learnt with it
        return None
    (turn,) = written.turns
    if not turn.is_closed:
        return None
    return cast(int, tokenizer.convert_tokens_to_ids(turn.text[turn.content_end :]))
