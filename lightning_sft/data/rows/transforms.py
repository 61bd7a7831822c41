"""Ready row transforms: rows in the forms of other programs become conversations; and a ready filter."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_sft.data.chat.conversation import is_asked
from lightning_sft.data.rows.columns import CONVERSATIONS
from lightning_sft.errors import SettingsError, shorten


def alpaca_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row in the format of Alpaca or LLaMA-Factory to a conversation; a `row_transform` of the datamodule.

    Args:
        row: Has `instruction`, and optionally `input` (without that, `context`), which goes on its own line below it;
            `output` (or `response`), which may be missing if the answer is to be generated; `system` (or
            `system_prompt`); and `history`, a list of `[question, answer]` pairs before it.

    Returns:
        The row with `messages` in the place of these columns. A row of another file that has messages already stays
        as it is.

    Raises:
        SettingsError: If there is no instruction, or a value is of another type.
    """
    more = "context" if row.get("input") is None and row.get("context") is not None else "input"
    return _conversation(row, ("instruction", more), ("output", "response"))


def query_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row with `query` and `response` to a conversation; a `row_transform` of the datamodule.

    Args:
        row: Has `query`; `response`, which may be missing if the answer is to be generated; and optionally `system`
            (or `system_prompt`), and `history`, a list of `[question, answer]` pairs before it.

    Returns:
        The row with `messages` in the place of these columns. A row of another file that has messages already stays
        as it is.

    Raises:
        SettingsError: If there is no query, or a value is of another type.
    """
    return _conversation(row, ("query",), ("response",))


def chosen_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Take the chosen answer of a preference row and drop the rejected one; a `row_transform` of the datamodule.

    Args:
        row: With `chosen`: a text, a message or messages that answer the row's `prompt`, its `messages`
            (`conversations`, `conversation`), or its `instruction` and `input`; or messages that begin with the
            question.

    Returns:
        The row without `chosen` and `rejected`, and with `output`, or with `messages` if the question is in them. A row
        of another file that has messages and no preferences stays as it is.

    Raises:
        SettingsError: If there is no chosen answer.
    """
    chosen = row.get("chosen")
    if chosen is None and _is_conversation(row):
        return dict(row)
    if chosen is None:
        raise SettingsError(f"no value for `chosen`. The row has {shorten(sorted(map(str, row)), 200)}.")
    rest = {column: value for column, value in row.items() if column not in ("chosen", "rejected")}
    answer = [chosen] if isinstance(chosen, Mapping) else chosen
    if isinstance(answer, list) and is_asked(answer[:1]):
        return {**rest, "messages": answer}
    asked = next((column for column in CONVERSATIONS if is_asked(row.get(column))), None)
    is_alpaca = rest.get("prompt") is None and {"instruction", "input"} <= set(rest)
    if asked is None and is_alpaca and isinstance(chosen, str):
        return alpaca_row({**rest, "output": chosen})
    if asked is None:
        return {**rest, "output": answer}
    answer = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return {**{column: value for column, value in rest.items() if column != asked}, "messages": [*row[asked], *answer]}


def is_rewarded(row: Mapping[str, Any]) -> bool:
    """Whether a response that `predict` wrote has the full reward and is not truncated; a `row_filter`.

    Train on such rows with `output_field="response"`. `best_responses` chooses among several responses to a prompt.

    Args:
        row: A record, with `reward` and `stop_reason`.

    Returns:
        Whether the reward is at least 1, and the response ended by itself or with a stop string.

    Raises:
        SettingsError: If the row is no record.
    """
    if "reward" not in row or "stop_reason" not in row:
        raise SettingsError(f"expected a record of `predict`. The row has {shorten(sorted(map(str, row)), 200)}.")
    return (row["reward"] or 0.0) >= 1.0 and row["stop_reason"] in ("eos", "stop")


def _conversation(row: Mapping[str, Any], questions: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """The row with `messages` in the place of the columns that they are made of; a conversation stays as it is."""
    if row.get(questions[0]) is None and _is_conversation(row):
        return dict(row)
    if row.get(questions[0]) is None:
        raise SettingsError(f"no value for `{questions[0]}`. The row has {shorten(sorted(map(str, row)), 200)}.")
    answer = next((column for column in answers if row.get(column) is not None), answers[0])
    words = "system_prompt" if row.get("system") is None else "system"
    texts = [_text(f"`{column}`", row.get(column) or "") for column in (words, *questions)]
    system, question = texts[0], "\n".join(filter(None, texts[1:]))
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, pair in enumerate(row.get("history") or [], 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise SettingsError(f"`history`, pair {number}, is {shorten(pair)}, expected `[question, answer]`.")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _text(f"`history`, pair {number},", text)})
    messages.append({"role": "user", "content": question})
    if row.get(answer) is not None:
        messages.append({"role": "assistant", "content": row[answer]})
    used = {*questions, answer, "system", words, "history"}
    return {**{column: value for column, value in row.items() if column not in used}, "messages": messages}


def _is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row, perhaps of another file, has messages already."""
    return any(row.get(column) is not None for column in CONVERSATIONS)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"{name} is {shorten(value)} of type {type(value).__name__}, expected a string.")
    return value
