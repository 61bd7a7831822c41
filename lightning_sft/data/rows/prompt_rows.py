"""Rows that a model is to continue; they need no output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.rows.bad_rows import BadRowCounts, BadRows, RowProblems
from lightning_sft.data.rows.row_format import AnyRow, RowFormat
from lightning_sft.data.rows.said import ChatRow, PlainPrompt, TokenPrompt
from lightning_sft.data.rows.sources import Source
from lightning_sft.data.rows.token_rows import check_vocabulary, num_token_ids
from lightning_sft.data.tokens.token_ids import decode_ids

_ROWS_READ_AT_ONCE = 1000


@dataclass(frozen=True)
class PromptRows:
    """Rows that a model is to continue, and what is to be said of them.

    The data set has the columns `prompt`, `ground_truth` and `as_written` (whether it is tokenised as it stands).
    """

    dataset: Dataset
    bad_rows: BadRowCounts
    unused_columns: Sequence[str]


def render_prompts(
    sources: Sequence[Source], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, on_bad_row: BadRows
) -> PromptRows:
    """Write the prompts of rows."""
    chat_encoder, num_ids, problems = ChatEncoder(tokenizer), num_token_ids(tokenizer), RowProblems(on_bad_row)
    prompts: list[dict[str, object]] = []
    unused_columns: set[str] = set()

    def columns(said: PlainPrompt | ChatRow | TokenPrompt) -> dict[str, object]:
        if isinstance(said, PlainPrompt):
            return {"prompt": said.prompt, "ground_truth": said.ground_truth, "as_written": False}
        if isinstance(said, TokenPrompt):
            check_vocabulary(said.input_ids, num_ids)
            prompt, answer = decode_ids(tokenizer, said.input_ids), None
        else:
            prompt, answer = chat_encoder.write_prompt(said.conversation)
        ground_truth = answer if said.ground_truth is None else said.ground_truth
        return {"prompt": prompt, "ground_truth": ground_truth, "as_written": True}

    for number, (location, row) in enumerate(_read(sources)):
        with problems.caught(number, location):
            said = row_format.render_prompt(row)
            prompts.append(columns(said))
            unused_columns.update(said.unused_columns)
    return PromptRows(Dataset.from_list(prompts), BadRowCounts(problems.found.values()), sorted(unused_columns))


def _read(sources: Sequence[Source]) -> Iterator[tuple[str, AnyRow]]:
    for source in sources:
        for start in range(0, len(source.rows), _ROWS_READ_AT_ONCE):
            indices = range(start, min(start + _ROWS_READ_AT_ONCE, len(source.rows)))
            yield from source.decode(source.rows[indices], indices)
