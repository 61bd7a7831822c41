"""Generation records, read back from the lines that they are kept in."""

import json
import math

from lightning_sft.errors import SettingsError
from lightning_sft.generation.records import GenerationRecord, problem_of

_OF_THE_FILE = ("step", "run")  # stands in each line, but is not of the record
_NEEDED = ("prompt", "response", "format_reward", "answer_reward", "reward", "token_entropy", "stop_reason")


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
        problem = problem_of(fields, _NEEDED)
        if not problem:
            if fields["token_entropy"] is None:  # it was no finite number
                fields["token_entropy"] = math.nan
            return GenerationRecord(**fields)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error)
    raise SettingsError(f"{location} is not a record of a generation: {problem}.")
