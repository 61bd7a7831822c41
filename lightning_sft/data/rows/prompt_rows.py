"""Rows that a model is to continue; they need no output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.rows.bad_rows import BadRow, BadRows, RowProblems
from lightning_sft.data.rows.row_format import AnyRow, ChatRow, PlainPrompt, RowFormat
from lightning_sft.data.rows.sources import Source

_ROWS_READ_AT_ONCE = 1000


@dataclass(frozen=True)
class PromptRows:
    """Rows that a model is to continue.

    Attributes:
        dataset: The columns `prompt`, `ground_truth` and `is_chat`.
        bad_rows: Rows that are left out.
        unused_columns: Columns that people mean to be used, and that are not.
    """

    dataset: Dataset
    bad_rows: Sequence[BadRow]
    unused_columns: Sequence[str]


def render_prompts(
    sources: Sequence[Source], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, on_bad_row: BadRows
) -> PromptRows:
    """Write the prompts of rows.

    Args:
        sources: From `open_sources`.
        row_format: Which columns are what.
        tokenizer: Any Hugging Face tokenizer.
        on_bad_row: Whether a malformed row is an error or is left out.

    Raises:
        SettingsError: If a row is malformed; the message names file and row.
    """
    chat_encoder, problems = ChatEncoder(tokenizer), RowProblems(on_bad_row)
    prompts: list[dict[str, object]] = []
    unused_columns: set[str] = set()
    for number, (location, row) in enumerate(_read(sources)):
        with problems.caught(number, location):
            rendered = row_format.render_prompt(row)
            prompts.append(_written(rendered, chat_encoder))
            unused_columns.update(rendered.unused_columns)
    return PromptRows(Dataset.from_list(prompts), list(problems.found.values()), sorted(unused_columns))


def _read(sources: Sequence[Source]) -> Iterator[tuple[str, AnyRow]]:
    for source in sources:
        for start in range(0, len(source.rows), _ROWS_READ_AT_ONCE):
            indices = range(start, min(start + _ROWS_READ_AT_ONCE, len(source.rows)))
            yield from source.decode(source.rows[start : indices.stop], list(indices))


def _written(rendered: PlainPrompt | ChatRow, chat_encoder: ChatEncoder) -> dict[str, object]:
    if isinstance(rendered, PlainPrompt):
        return {"prompt": rendered.prompt, "ground_truth": rendered.ground_truth, "is_chat": False}
    prompt, answer = chat_encoder.write_prompt(rendered.conversation)
    ground_truth = answer if rendered.ground_truth is None else rendered.ground_truth
    return {"prompt": prompt, "ground_truth": ground_truth, "is_chat": True}
