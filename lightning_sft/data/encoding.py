"""From rows to token ids: rows are rendered as text and tokenised, and the over-long ones dropped or cut."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Features, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_choice, check_integer, check_type
from lightning_sft.data.cache import code_hash
from lightning_sft.data.chat.chat_encoding import ChatEncoder, WrittenExample
from lightning_sft.data.chat.notices import Notice
from lightning_sft.data.rows.row_format import PlainRow, Row, RowFormat
from lightning_sft.data.rows.sources import Source
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.tokenization import encode_examples
from lightning_sft.errors import SettingsError, located, shorten

TooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True)
class Encoding:
    """How rows become token ids.

    Args:
        max_length: The most tokens of prompt and response together, EOS included; no limit if None.
        too_long: What happens to longer rows: an error, or they are dropped, or cut at the end (losing their EOS). A
            row whose prompt alone leaves no room for a response is dropped under `truncate` too.
        append_eos: Whether each response ends in EOS. Conversations end as the chat template has it.

    Raises:
        SettingsError: If an argument is of another type or out of range.
    """

    max_length: int | None = None
    too_long: TooLong = "error"
    append_eos: bool = True

    def __post_init__(self) -> None:
        check_integer("max_length", self.max_length, optional=True)
        if self.max_length is not None and self.max_length < 2:
            raise SettingsError(
                f"`max_length` is {self.max_length}, expected at least 2: a prompt token and a response token."
            )
        check_choice("too_long", self.too_long, TooLong)
        check_type("append_eos", self.append_eos, bool, "true or false")

    @property
    def limit_in_words(self) -> str:
        """What is wrong with the rows that are dropped or cut."""
        return f"longer than `max_length` = {self.max_length} tokens"


@dataclass(frozen=True)
class ExampleText:
    """What an example says, before it is tokenised.

    Attributes:
        row: The number of its row among those that are encoded together, from 0.
        location: Where its row comes from, such as `line 3 of train.jsonl`.
        prompt: The text before the response; of a conversation, what prompts for the last turn that is learnt.
        output: The response; of a conversation, the last turn that is learnt.
        ground_truth: The reference answer; by default the output, or what this turn says.
        conversation: The conversation, if it is one.
    """

    row: int
    location: str
    prompt: str
    output: str
    ground_truth: str
    conversation: WrittenExample | None = None


@dataclass(frozen=True)
class EncodedExample:
    """An example as text and as token ids.

    Attributes:
        text: What it says, whole even where it is truncated.
        example: Its tokens.
        is_truncated: Whether they are cut off at `max_length`.
        is_dropped: Whether it is left out, since it is longer than `max_length`.
        notices: What a user is to know of it.
    """

    text: ExampleText
    example: Example
    is_truncated: bool = False
    is_dropped: bool = False
    notices: Sequence[Notice] = ()


ENCODED_FEATURES = Features(
    {
        "prompt": Value("string"),
        "output": Value("string"),
        "ground_truth": Value("string"),
        "is_chat": Value("bool"),
        "input_ids": [Value("int32")],
        "num_prompt_tokens": Value("int32"),
        "excluded_spans": [Value("int32")],
        "num_tokens": Value("int32"),
        "num_response_tokens": Value("int32"),
        "location": Value("string"),
        "row": Value("int32"),
        "is_truncated": Value("bool"),
        "is_dropped": Value("bool"),
        "notices": [{"kind": Value("string"), "example": Value("string")}],
    }
)


def to_columns(encoded: Sequence[EncodedExample]) -> dict[str, list[Any]]:
    """The columns of `ENCODED_FEATURES`."""
    texts, examples = [each.text for each in encoded], [each.example for each in encoded]
    return {
        "prompt": [text.prompt for text in texts],
        "output": [text.output for text in texts],
        "ground_truth": [text.ground_truth for text in texts],
        "is_chat": [text.conversation is not None for text in texts],
        "input_ids": [example.input_ids for example in examples],
        "num_prompt_tokens": [example.num_prompt_tokens for example in examples],
        "excluded_spans": [example.excluded_spans for example in examples],
        "num_tokens": [len(example.input_ids) for example in examples],
        "num_response_tokens": [example.num_response_labels for example in examples],
        "location": [example.location for example in examples],
        "row": [text.row for text in texts],
        "is_truncated": [each.is_truncated for each in encoded],
        "is_dropped": [each.is_dropped for each in encoded],
        "notices": [[asdict(notice) for notice in each.notices] for each in encoded],
    }


@dataclass
class RowEncoder:
    """Turns rows into token ids.

    Args:
        row_format: Which columns are what.
        tokenizer: Any Hugging Face tokenizer.
        encoding: How rows become token ids.
    """

    row_format: RowFormat
    tokenizer: PreTrainedTokenizerBase
    encoding: Encoding

    def __call__(
        self, batch: dict[str, list[Any]], indices: list[int], source: Source, keep_name: bool
    ) -> dict[str, list[Any]]:
        """The columns of a batch of rows, as `datasets.Dataset.map` calls it.

        Args:
            batch: Columns of the source's rows.
            indices: Which of its rows these are.
            source: Where they come from.
            keep_name: Whether locations say of which source they are.

        Raises:
            ValueError: As `encode`.
        """
        columns = to_columns(self.encode(source.decode(batch, indices), None if keep_name else source.name))
        return {**columns, "row": [indices[row] for row in columns["row"]]}

    def encode(self, rows: Iterable[tuple[str, Row]], only_source: str | None = None) -> list[EncodedExample]:
        """Tokenise rows. A conversation can become several examples.

        Args:
            rows: Each with its location, such as `line 3 of train.jsonl`.
            only_source: The name of the source if there is one alone: the examples' locations then leave it out.

        Raises:
            ValueError: If a row is malformed, has no response token, or is too long; the message begins with its
                location.
        """
        chat_encoder = ChatEncoder(self.tokenizer, self.row_format.train_on_turns, self.encoding.append_eos)
        texts: list[ExampleText] = []
        for number, (location, row) in enumerate(rows):
            with located(location):
                texts += self._texts(number, location, row, chat_encoder)
        plain = [text for text in texts if text.conversation is None]
        prompts, outputs = [text.prompt for text in plain], [text.output for text in plain]
        plain_examples = iter(encode_examples(prompts, outputs, self.tokenizer, self.encoding.append_eos))
        chat_examples = chat_encoder.encode([text.conversation for text in texts if text.conversation is not None])
        encoded = []
        for text in texts:
            with located(text.location):
                if text.conversation is None:
                    each = EncodedExample(text, next(plain_examples))
                else:
                    conversation = next(chat_examples)
                    each = EncodedExample(text, conversation.example, notices=conversation.notices)
                short_location = text.location.removesuffix(f" of {only_source}") + _turn_in_words(text)
                encoded.append(
                    self._within_length(replace(each, example=replace(each.example, location=short_location)))
                )
        return encoded

    def _texts(self, number: int, location: str, row: Row, chat_encoder: ChatEncoder) -> list[ExampleText]:
        rendered = self.row_format.render(row)
        if isinstance(rendered, PlainRow):
            return [ExampleText(number, location, rendered.prompt, rendered.output, rendered.ground_truth)]
        written = chat_encoder.write(rendered.conversation)
        answers = [each.answer for each in written]
        if rendered.ground_truth is not None:
            answers[-1] = rendered.ground_truth
        return [
            ExampleText(number, location, each.prompt, each.output, answer, each)
            for each, answer in zip(written, answers, strict=True)
        ]

    def _within_length(self, encoded: EncodedExample) -> EncodedExample:
        """The example, cut or marked as dropped if it is too long."""
        max_length, example = self.encoding.max_length, encoded.example
        if not example.num_response_labels:
            raise SettingsError(
                f"no response token to learn from; `{self.row_format.output_field}` is {shorten(encoded.text.output)}. "
                "Remove the row, or set `append_eos=True`."
            )
        if max_length is None or len(example.input_ids) <= max_length:
            return encoded
        if self.encoding.too_long == "error":
            raise SettingsError(
                f"{len(example.input_ids)} tokens ({example.num_prompt_tokens} of the prompt) exceed `max_length` = "
                f'{max_length}. Raise `max_length`, or set `too_long` to "drop" or "truncate".'
            )
        truncated = example.truncated(max_length)
        if self.encoding.too_long == "drop" or not truncated.num_response_labels:
            text = replace(encoded.text, prompt="", output="", ground_truth="")  # nothing of it is stored
            return EncodedExample(text, Example([], 0, location=example.location), is_dropped=True)
        return replace(encoded, example=truncated, is_truncated=True)

    def fingerprint(self) -> str:
        """Changes with the tokenizer's content, the options, and the code that reads and encodes."""
        tokenizer, transform = self.tokenizer, self.row_format.row_transform
        if getattr(tokenizer, "backend_tokenizer", None) is not None:  # its calls leave their settings behind
            content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        else:
            content = [sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
        special = (type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.split_special_tokens)
        template = (tokenizer.chat_template, tokenizer.special_tokens_map)
        # A function of a module is hashed by its name alone, so the module's code is added.
        module = sys.modules.get(getattr(getattr(transform, "func", transform), "__module__", ""))
        file = getattr(module, "__file__", None)
        code = [code_hash(), Path(file).read_bytes() if file else b""]
        return str(Hasher.hash([code, content, special, template, (self.row_format, self.encoding)]))


def _turn_in_words(text: ExampleText) -> str:
    """Which turn the example is of, if its row becomes several."""
    if text.conversation is None or text.conversation.is_whole:
        return ""
    return f", turn {text.conversation.turns[-1].index + 1}"
