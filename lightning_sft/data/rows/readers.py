"""Readers of JSONL, JSON and CSV files: rows one by one, each with its location in the file."""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning_sft.errors import SettingsError, one_line, shorten


@dataclass(frozen=True)
class UnreadableRow:
    """What stands where a row should be; whoever uses it says so, or leaves it out.

    Attributes:
        problem: Why it is no row.
    """

    problem: str


def read_file(path: str, skip: int = 0) -> Iterator[tuple[str, dict[str, Any] | UnreadableRow]]:
    """The rows of a JSONL, JSON or CSV file one by one, each with its location in it, such as `line 3`.

    Args:
        path: The file.
        skip: Leave out so many rows at the start, unparsed if each is a line of JSON.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has no rows, or it is malformed so that nobody knows where a row ends.
    """
    rows: Iterator[tuple[str, object]]
    if path.endswith(".csv"):
        rows = islice(_read_csv(path), skip, None)
    elif path.endswith(".json") and _is_list(path):
        rows = islice(_read_json_list(path), skip, None)
    else:
        rows = _read_json_lines(path, skip)
    has_rows = False
    for location, row in rows:
        has_rows = True
        if not isinstance(row, dict | UnreadableRow):
            row = UnreadableRow(f"expected a JSON object, got {shorten(row)}.")
        yield location, row
    if not has_rows and not skip:
        raise SettingsError("it has no rows.")


def parse_json(text: str) -> Any:
    """What a text of JSON holds, or an `UnreadableRow` if it cannot be read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return UnreadableRow(f"not valid JSON ({problem}): {shorten(text)}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a deep nest
        return UnreadableRow(f"cannot be read as JSON: {one_line(error)}.")


def _read_json_lines(path: str, skip: int) -> Iterator[tuple[str, object]]:
    lines = ((number, line) for number, line in _text_lines(path) if isinstance(line, UnreadableRow) or line.strip())
    for number, line in islice(lines, skip, None):
        yield f"line {number}", line if isinstance(line, UnreadableRow) else parse_json(line)


def _is_list(path: str) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return next((char for char in iter(lambda: file.read(1), "") if not char.isspace()), "") == "["


def _read_json_list(path: str) -> Iterator[tuple[str, object]]:
    rows = json.loads("".join(_text(path)))
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: str) -> Iterator[tuple[str, object]]:
    reader = csv.reader(_text(path), strict=True)
    field_size_limit = csv.field_size_limit(sys.maxsize)  # unless raised, no field may pass 131,072 characters
    try:
        records = filter(None, reader)  # a blank line is an empty record
        header = next(records, [])
        twice = {column for column in header if column and header.count(column) > 1}
        if twice:
            raise SettingsError(f"its header has {shorten(min(twice))} more than once. Rename all but one.")
        for number, record in enumerate(records, 1):
            is_whole = len(record) == len(header)
            problem = f"expected {len(header)} fields, as in the header, got {len(record)}."
            yield f"row {number}", dict(zip(header, record, strict=True)) if is_whole else UnreadableRow(problem)
    except csv.Error as error:
        problem = str(error)
        if "new-line" in problem:  # a lone carriage return; what `csv` advises is about its own arguments
            problem = "a carriage return in a field without quotes. Quote the field, or end lines with a line feed"
        raise SettingsError(f"line {reader.line_num}: {problem}.") from None
    finally:
        csv.field_size_limit(field_size_limit)


def _text(path: str) -> Iterator[str]:
    """The lines of a file that is a whole: one that is no text makes all of it unreadable."""
    for number, line in _text_lines(path):
        if isinstance(line, UnreadableRow):
            raise SettingsError(f"line {number}: {line.problem}")
        yield line


def _text_lines(path: str) -> Iterator[tuple[int, str | UnreadableRow]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, UnreadableRow(f"not UTF-8 text ({error.reason}). Save the file as UTF-8.")
