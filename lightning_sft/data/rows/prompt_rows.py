"""Rows that a model is to continue; they need no output."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.rows.row_format import PlainPrompt, RowFormat
from lightning_sft.data.rows.sources import Source
from lightning_sft.errors import located

_ROWS_READ_AT_ONCE = 1000


def render_prompts(sources: Sequence[Source], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The columns `prompt`, `ground_truth` and `is_chat` of rows that need no output.

    Raises:
        ValueError: If a row is malformed; the message names file and row.
    """
    chat_encoder, prompts = ChatEncoder(tokenizer), []
    for source in sources:
        for start in range(0, len(source.rows), _ROWS_READ_AT_ONCE):
            indices = range(start, min(start + _ROWS_READ_AT_ONCE, len(source.rows)))
            for location, row in source.decode(source.rows[start : indices.stop], list(indices)):
                with located(location):
                    rendered = row_format.render_prompt(row)
                    is_chat = not isinstance(rendered, PlainPrompt)
                    if isinstance(rendered, PlainPrompt):
                        prompt, ground_truth = rendered.prompt, rendered.ground_truth
                    else:
                        prompt, answer = chat_encoder.write_prompt(rendered.conversation)
                        ground_truth = answer if rendered.ground_truth is None else rendered.ground_truth
                prompts.append({"prompt": prompt, "ground_truth": ground_truth, "is_chat": is_chat})
    return Dataset.from_list(prompts)
