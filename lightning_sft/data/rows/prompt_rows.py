"""Rows that a model is to continue; they need no output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.rows.bad_rows import BadRowCounts, BadRows, RowProblems
from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.data.rows.row_format import AnyRow, PlainRow, RowFormat, TokenRow
from lightning_sft.data.rows.sources import Source
from lightning_sft.data.rows.token_rows import check_vocabulary, num_token_ids
from lightning_sft.data.tokens.tokenization import decode_ids

_ROWS_READ_AT_ONCE = 1000


@dataclass(frozen=True)
class PromptRows:
    """The prompts of rows, and what is to be said of the rows."""

    prompts: list[Prompt]
    bad_rows: BadRowCounts
    unused_columns: Sequence[str]


def render_prompts(
    sources: Sequence[Source], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, on_bad_row: BadRows
) -> PromptRows:
    """Write the prompts of rows."""
    chat_encoder, num_ids, problems = ChatEncoder(tokenizer), num_token_ids(tokenizer), RowProblems(on_bad_row)
    prompts: list[Prompt] = []
    unused_columns: set[str] = set()
    for number, (location, row) in enumerate(_read(sources)):
        with problems.caught(number, location):
            rendered = row_format.render_prompt(row)
            answer = None
            if isinstance(rendered, PlainRow):
                text = rendered.prompt
            elif isinstance(rendered, TokenRow):
                check_vocabulary(rendered.example.input_ids, num_ids)
                text = decode_ids(tokenizer, rendered.example.input_ids)
            else:
                text, answer = chat_encoder.write_prompt(rendered.conversation)
            ground_truth = answer if rendered.ground_truth is None else rendered.ground_truth
            prompts.append(Prompt(len(prompts), text, ground_truth, not isinstance(rendered, PlainRow)))
            unused_columns.update(rendered.unused_columns)
    return PromptRows(prompts, BadRowCounts(problems.found.values()), sorted(unused_columns))


def _read(sources: Sequence[Source]) -> Iterator[tuple[str, AnyRow]]:
    for source in sources:
        for start in range(0, len(source.rows), _ROWS_READ_AT_ONCE):
            indices = range(start, min(start + _ROWS_READ_AT_ONCE, len(source.rows)))
            yield from source.decode(source.rows[indices], indices)
