"""An encoded example: what it says, its tokens, and how both are stored."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
from datasets import Features, Value

from lightning_sft.data.chat.chat_encoding import WrittenExample
from lightning_sft.data.chat.notices import Notice
from lightning_sft.data.tokens.example import Example


@dataclass(frozen=True)
class ExampleText:
    """What an example says, before it is tokenised.

    Attributes:
        row: The number of its row among those that are encoded together, from 0.
        location: Where its row comes from, such as `line 3 of train.jsonl`.
        prompt: The text before the response; of a conversation, what prompts for the last turn that is learnt.
        output: The response; of a conversation, the last turn that is learnt.
        ground_truth: The reference answer; by default the output, or what this turn says. None if there is none.
        conversation: The conversation, if it is one.
        tokens: The tokens of a row that is tokenised already.
        is_whole: Whether prompt and output are one text, of which the prompt is nothing.
        unused_columns: Columns of its row that people mean to be used, and that are not.
    """

    row: int
    location: str
    prompt: str
    output: str
    ground_truth: str | None
    conversation: WrittenExample | None = None
    tokens: Example | None = None
    is_whole: bool = False
    unused_columns: Sequence[str] = ()

    @property
    def as_written(self) -> bool:
        """Whether the prompt is tokenised as it stands, without the tokenizer's own prefix (BOS)."""
        return self.conversation is not None or self.tokens is not None


@dataclass(frozen=True)
class EncodedExample:
    """An example as text and as token ids.

    Attributes:
        text: What it says, whole even where it is truncated.
        example: Its tokens.
        is_truncated: Whether they are cut off at `max_length`.
        is_dropped: Whether it is left out, since it is longer than `max_length` or its row is bad.
        problem: What is wrong with its row; None if nothing is.
        notices: What a user is to know of it.
    """

    text: ExampleText
    example: Example
    is_truncated: bool = False
    is_dropped: bool = False
    problem: str | None = None
    notices: Sequence[Notice] = ()


ENCODED_FEATURES = Features(
    {
        "prompt": Value("string"),
        "output": Value("string"),
        "ground_truth": Value("string"),
        "as_written": Value("bool"),
        "input_ids": [Value("int32")],
        "num_prompt_tokens": Value("int32"),
        "excluded_spans": [Value("int32")],
        "num_tokens": Value("int32"),
        "num_response_tokens": Value("int32"),
        "location": Value("string"),
        "row": Value("int32"),
        "is_truncated": Value("bool"),
        "is_dropped": Value("bool"),
        "problem": Value("string"),
        "unused_columns": [Value("string")],
        "notices": [{"kind": Value("string"), "example": Value("string")}],
    }
)


def to_table(encoded: Sequence[EncodedExample], row_numbers: Sequence[int] | None = None) -> pa.Table:
    """The columns of `ENCODED_FEATURES`; made here, since `datasets` would look at every value by itself.

    `row_numbers` are those of the encoded rows in their source, by default from 0.
    """
    texts, examples = [each.text for each in encoded], [each.example for each in encoded]
    columns = {
        "prompt": [text.prompt for text in texts],
        "output": [text.output for text in texts],
        "ground_truth": [text.ground_truth for text in texts],
        "as_written": [text.as_written for text in texts],
        "input_ids": [example.input_ids for example in examples],
        "num_prompt_tokens": [example.num_prompt_tokens for example in examples],
        "excluded_spans": [example.excluded_spans for example in examples],
        "num_tokens": [len(example.input_ids) for example in examples],
        "num_response_tokens": [example.num_response_labels for example in examples],
        "location": [example.location for example in examples],
        "row": [text.row if row_numbers is None else row_numbers[text.row] for text in texts],
        "is_truncated": [each.is_truncated for each in encoded],
        "is_dropped": [each.is_dropped for each in encoded],
        "problem": [each.problem for each in encoded],
        "unused_columns": [text.unused_columns for text in texts],
        "notices": [[asdict(notice) for notice in each.notices] for each in encoded],
    }
    return pa.Table.from_pydict(columns, ENCODED_FEATURES.arrow_schema)
