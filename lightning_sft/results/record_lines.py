"""Generation records, read back from the lines that they are kept in."""

import json
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from lightning_sft.errors import SettingsError, shorten
from lightning_sft.generation.records import GenerationRecord

_OF_THE_FILE = ("step", "run")  # stands in each line, but is not of the record
_TEXTS = ("prompt", "response")
_NUMBERS = ("format_reward", "answer_reward", "reward", "token_entropy")


def parse_records(text: str, source: str) -> list[GenerationRecord]:
    """The records of a file that `predict` or a `GenerationMonitor` has written, or is still writing.

    Args:
        text: All lines of the file. A last one that has no end yet and is no whole record is left out.
        source: What messages call the file.

    Raises:
        SettingsError: If a line is no record; the message names it.
    """
    *lines, last = text.split("\n")
    records = [_record(line, f"line {number} of {source}") for number, line in enumerate(lines, 1) if line.strip()]
    return [*records, _record(last, f"line {len(lines) + 1} of {source}")] if _is_whole(last) else records


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _record(line: str, location: str) -> GenerationRecord:
    try:
        fields = {name: value for name, value in json.loads(line).items() if name not in _OF_THE_FILE}
        problem = _problem(fields)
        if not problem:
            return GenerationRecord(**fields | {"token_entropy": _number(fields["token_entropy"])})
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        problem = f"no value for {error}" if isinstance(error, KeyError) else str(error)
    raise SettingsError(f"{location} is no record of a generation: {problem}")


def _problem(fields: Mapping[str, Any]) -> str:
    """What is wrong with values that everything else relies on; empty if nothing is."""
    for name in _TEXTS:
        if not isinstance(fields[name], str):
            return f"`{name}` is {shorten(fields[name])}, expected text."
    for name in _NUMBERS:
        value = fields[name]
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not is_number:
            return f"`{name}` is {shorten(value)}, expected a number or null."
    return ""


def _number(value: float | None) -> float:
    """What is written as null was no finite number."""
    return math.nan if value is None else value
