"""Names of columns that people use, and what to do with rows that have them."""

from collections.abc import Mapping, Sequence
from typing import Any

CONVERSATIONS = ("messages", "conversations", "conversation")  # columns that hold one
TEXTS = ("prompt", "output", "completion")  # columns of a row that is no text as a whole
_PROMPTS = ("question", "query", "instruction", "problem", "input", "inputs", "source")  # what people call a prompt,
_OUTPUTS = ("output", "completion", "response", "answer", "solution", "target", "targets")  # and an output
_AS_CHAT = "`as_chat: true` writes `system`, `tools`, prompt and output with the chat template"
_TOKENS = "`input_ids` is used instead: remove it with a `row_transform`, and the text is tokenised here"
_ALPACA = "`row_transform: lightning_sft.alpaca_row` makes messages of `instruction`, `input`, `output` and `history`"
_TEMPLATE = "`prompt_template` can name any column"
_SYSTEM = "`row_transform` can rename `system_prompt` to `system`, which stands before the first turn of a conversation"
_LABELS = ("label", "kto_tag")  # what people say of an output, true or false
_WEIGHTS = ("weight", "loss_weight", "sample_weight")  # and of a row
PICTURES = ("image", "images", "videos", "audios")
_PICTURES = "`row_filter` can leave out rows with more than text, since nothing else is learnt"
MISSED_IN_CONVERSATIONS = {  # columns that people mean to be used, and what would use them
    "system_prompt": _SYSTEM,
    **dict.fromkeys(PICTURES, _PICTURES),
    **dict.fromkeys(_LABELS, "`row_filter` can leave out rows that say false of their output (as for KTO)"),
    **dict.fromkeys(_WEIGHTS, "`train_data: {source: weight}` weights the rows of a whole source"),
}
WRITTEN_BY_AS_CHAT = ("system", "tools", "functions")
EASILY_MISSED = {  # and beside a prompt
    **dict.fromkeys(WRITTEN_BY_AS_CHAT, _AS_CHAT),
    "history": _ALPACA,
    "input": _ALPACA,
    "context": _TEMPLATE,
    **MISSED_IN_CONVERSATIONS,
}
_OF_TEXTS = ("system", "history", "input")
_BESIDE_TOKENS = (*CONVERSATIONS, *TEXTS, "text")  # columns that a row of tokens need not have, but may


def unused_beside_tokens(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of a row that is tokenised already which would be used otherwise."""
    return tuple(column for column in _BESIDE_TOKENS if row.get(column) is not None)


def is_missed(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has something in one of these columns that people would miss."""
    if column in _LABELS:
        return row.get(column) is False
    return row.get(column) not in (None, 1) if column in _WEIGHTS else bool(row.get(column))


def unused_in_words(columns: Sequence[str]) -> str:
    """What a user is told of columns that nothing uses."""
    ways = dict.fromkeys(EASILY_MISSED.get(column, _TOKENS) for column in columns)
    if any(column in _OF_TEXTS for column in columns):
        ways[_TEMPLATE] = None
    return (
        f"nothing uses the column{'s' if columns[1:] else ''} {', '.join(f'`{name}`' for name in columns)}. "
        f"{'; '.join(ways)}."
    )


def way_out(row: Mapping[str, Any], missing: Mapping[str, str]) -> str:
    """What to do with a row that lacks a prompt or an output by its default name; empty if it has nothing known.

    `missing` has for each column that the row lacks the argument that names it.
    """
    has_prompt = "prompt" not in missing
    for column, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and {"role", "from"} & set(value[0]):
            if column in CONVERSATIONS:
                return f" `{column}` has messages: leave out the arguments that name other columns."
            if not has_prompt and len(missing) == 1:
                return f" `{column}` has messages: set `prompt_field` to `{column}`."
            return f" `{column}` has messages: let a `row_transform` return them as `messages`."
    if not has_prompt and "instruction" in row and {"output", "input", "context"} & set(row):
        return " Set `row_transform` to `lightning_sft.alpaca_row`."
    if not has_prompt and {"query", "response"} <= set(row):
        return " Set `row_transform` to `lightning_sft.query_row`."
    known = {"prompt": _PROMPTS, "output": _OUTPUTS}
    found = {
        argument: next((name for name in known[column] if isinstance(row.get(name), str)), None)
        for column, argument in missing.items()
    }
    if not found or not all(found.values()):
        return ""
    return f" Set {' and '.join(f'`{argument}` to `{name}`' for argument, name in found.items())}."
