"""Rows that are tokenised already: their ids, and which of them are learnt."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.example import Example
from lightning_sft.errors import SettingsError, shorten

IDS = "input_ids"
IGNORED_LABEL = -100
_MASKS = ("response_mask", "completion_mask", "assistant_masks")
_OTHER_MASKS = ("loss_mask", "loss_scale", "loss_weights", "prompt_mask", "mask")  # which programs take otherwise


def read_tokens(row: Mapping[str, Any]) -> Example:
    """The example that a row holds.

    A token is learnt if all of `labels`, `response_mask`, `completion_mask` and `assistant_masks` that the row has say
    so; without any of them all tokens are. Labels are not shifted: at each position there is the id or -100. What
    `attention_mask` says is padding is left out.
    """
    ids, is_learnt = _ids_and_marks(row)
    example = _example(ids, is_learnt)
    if example is None or not example.num_response_labels:
        marks = " and ".join(f"`{name}`" for name in _marks(row)) or f"`{IDS}`"
        raise SettingsError(
            f"no token is learnt of its {len(ids)}: {marks} must mark one that has another before it. Remove the row."
        )
    return example


def read_prompt_tokens(row: Mapping[str, Any]) -> Example:
    """What a model goes on from: the tokens before the last stretch that is learnt; all if no column marks any."""
    ids, is_learnt = _ids_and_marks(row)
    example = _example(ids, is_learnt)
    length = len(ids) if example is None or not _marks(row) else last_stretch(example)[0]
    return Example(ids[:length], length)


def last_stretch(example: Example) -> tuple[int, int]:
    """Where the last tokens begin and end that stand together and are learnt."""
    bounds = [example.num_prompt_tokens, *example.excluded_spans, len(example.input_ids)]
    return [(start, end) for start, end in zip(bounds[::2], bounds[1::2], strict=True) if end > start][-1]


def _marks(row: Mapping[str, Any]) -> list[str]:
    """The columns that say which tokens are learnt."""
    return [name for name in ("labels", *_MASKS) if row.get(name) is not None]


def _ids_and_marks(row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    for name in _OTHER_MASKS:
        if row.get(name) is not None:
            raise SettingsError(
                f"the row has `{IDS}` and `{name}`, but programs differ in what that means. With a `row_transform`, "
                "give `response_mask` instead, with 1 at each token that is learnt itself, or remove the column."
            )
    ids, marks = _numbers(row[IDS], IDS), _marks(row)
    columns = {name: _numbers(row[name], name) for name in marks}
    attention_mask = row.get("attention_mask")
    padding = [1] * len(ids) if attention_mask is None else _numbers(attention_mask, "attention_mask")
    for name, values in {**columns, "attention_mask": padding}.items():
        if len(values) != len(ids):
            raise SettingsError(f"`{name}` has {len(values)} values, but `{IDS}` has {len(ids)}.")
        if name != "labels":
            for position, value in enumerate(values):
                if value not in (0, 1):
                    raise SettingsError(f"`{name}` has {value} at position {position}, expected 0 or 1.")
    _check_labels(columns.get("labels", []), ids)
    start, end = _unpadded(padding)
    _refuse_packed(row, start, end)
    not_learnt = {name: IGNORED_LABEL if name == "labels" else 0 for name in marks}
    is_learnt = [all(columns[name][position] != not_learnt[name] for name in marks) for position in range(start, end)]
    return ids[start:end], is_learnt


def check_vocabulary(ids: Sequence[int], num_ids: int) -> None:
    """Refuse ids that a tokenizer does not have, whose highest is `num_ids - 1`."""
    if ids and not (min(ids) >= 0 and max(ids) < num_ids):
        position = next(number for number, token_id in enumerate(ids) if not 0 <= token_id < num_ids)
        raise SettingsError(
            f"`{IDS}` has {ids[position]} at position {position}, but the tokenizer's ids end at {num_ids - 1}. Give "
            "the tokenizer that made the row."
        )


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _numbers(value: object, column: str) -> list[int]:
    if hasattr(value, "tolist"):  # an array or a tensor that `row_transform` has returned
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise SettingsError(
            f"`{column}` is {shorten(value)} of type {type(value).__name__}, expected a list of whole numbers."
        )
    for position, number in enumerate(value):
        if type(number) is not int and type(number) is not bool:
            raise SettingsError(f"`{column}` has {shorten(number)} at position {position}, expected a whole number.")
    return list(map(int, value))


def _check_labels(labels: Sequence[int], ids: Sequence[int]) -> None:
    for position, (label, token_id) in enumerate(zip(labels, ids, strict=False)):
        if label not in (IGNORED_LABEL, token_id):
            is_shifted = all(each in (IGNORED_LABEL, after) for each, after in zip(labels, ids[1:], strict=False))
            reason = " The labels are shifted by one: undo the shift, as for `transformers`." if is_shifted else ""
            raise SettingsError(
                f"`labels` has {label} at position {position}, expected {IGNORED_LABEL} or the id there, {token_id}."
                f"{reason}"
            )


def _unpadded(attention_mask: Sequence[int]) -> tuple[int, int]:
    """Where the tokens begin and end that are no padding."""
    start = next((position for position, value in enumerate(attention_mask) if value), 0)
    end = start + sum(attention_mask)
    if not all(attention_mask[start:end]):
        raise SettingsError("`attention_mask` has 0 between tokens; expected it at the start or the end, for padding.")
    return start, end


def _refuse_packed(row: Mapping[str, Any], start: int, end: int) -> None:
    """Refuse several texts in one row, which would see each other."""
    positions, lengths = row.get("position_ids"), row.get("seq_lengths")
    if positions is not None and _numbers(positions, "position_ids")[start:end] != list(range(end - start)):
        found = "`position_ids` does not count from 0 to the end"
    elif lengths is not None and len(_numbers(lengths, "seq_lengths")) != 1:
        found = f"`seq_lengths` has {len(lengths)} values"
    else:
        return
    raise SettingsError(
        f"{found}: several texts are packed into the row. Give each a row of its own; optimizer steps pack them."
    )


def _example(ids: list[int], is_learnt: Sequence[bool]) -> Example | None:
    if not any(is_learnt):
        return None
    first = is_learnt.index(True)
    excluded_spans, position = [], first
    for learnt, group in groupby(is_learnt[first:]):
        start, position = position, position + len(list(group))
        excluded_spans += [] if learnt else [start, position]
    return Example(ids, first, excluded_spans)
