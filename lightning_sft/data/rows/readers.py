"""Readers of JSONL, JSON, CSV and TSV files: rows one by one, each with its location in the file."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

from lightning_sft.data.rows.files import FileKind
from lightning_sft.errors import SettingsError, one_line, shorten

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class UnreadableRow:
    """Stands in the place of a row that cannot be read: whoever uses the rows raises the problem, or leaves it out."""

    problem: str


def read_file(
    path: str, skip: int = 0, kind: FileKind | None = None
) -> Iterator[tuple[str, dict[str, Any] | UnreadableRow]]:
    """The rows of a JSONL, JSON, CSV or TSV file one by one, each with its location in it, such as `line 3`.

    Args:
        path: The file.
        skip: Leave out so many rows at the start, unparsed if each is a line of JSON.
        kind: What it is. By default what its name says.
    """
    file = _TextFile(path, kind or FileKind.of(path))
    rows: Iterator[tuple[str, object]]
    if file.kind.suffix in _DELIMITERS:
        rows = islice(_read_csv(file, _DELIMITERS[file.kind.suffix]), skip, None)
    elif file.kind.suffix == ".json" and (whole := _read_whole_json(file)) is not None:
        rows = islice(((f"row {number}", row) for number, row in enumerate(whole, 1)), skip, None)
    else:
        lines = islice(file.filled_lines(), skip, None)
        rows = ((f"line {n}", line if isinstance(line, UnreadableRow) else parse_json(line)) for n, line in lines)
    has_rows = False
    for location, row in rows:
        has_rows = True
        if not isinstance(row, dict | UnreadableRow):
            row = UnreadableRow(f"expected a JSON object, got {shorten(row)}.")
        yield location, row
    if not has_rows and not skip:
        raise SettingsError("it has no rows.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, unless it has two values by one name, of which `json` would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {max(names, key=names.count)!r} more than once")
    return found


_load_json = json.JSONDecoder(object_pairs_hook=_object).decode


def parse_json(text: str) -> Any:
    """What a text of JSON holds, or an `UnreadableRow` if it cannot be read."""
    try:
        return _load_json(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return UnreadableRow(f"not valid JSON ({problem}): {shorten(text)}")
    except (ValueError, RecursionError) as error:  # a name twice, a number of 5,000 digits, a deep nest
        return UnreadableRow(f"cannot be read as JSON: {one_line(error)}.")


def _read_whole_json(file: "_TextFile") -> list[object] | None:
    """The rows of a file that is one value: a list, or an object with the list `data`. None: it is lines of JSON."""
    start = file.first_character()
    if start == "[":
        return _read_list("".join(file.text()))
    lines = file.filled_lines()
    _, first = next(lines, (0, ""))
    if start != "{" or isinstance(first, UnreadableRow):
        return None
    try:
        value = _load_json(first)
        has_more = next(lines, None) is not None
    except json.JSONDecodeError as error:
        if error.pos < len(first.rstrip()):  # or else the object may go on in the next line
            return None
        return _read_object_over_lines(file)
    except (ValueError, RecursionError):  # which the row says itself
        return None
    data = value.get("data") if isinstance(value, dict) and not has_more else None
    return data if isinstance(data, list) and all(isinstance(row, dict) for row in data) else None


def _read_list(text: str) -> list[object]:
    """The rows of a list; each is read by itself if in one of them an object has a name twice."""
    try:
        rows: list[object] = _load_json(text)
        return rows
    except json.JSONDecodeError:
        raise
    except ValueError:
        json.loads(text)  # refuses what makes the whole list unreadable
    rows, between, end = [], re.compile(r"[\s,]*"), text.index("[") + 1
    while text[start := cast(re.Match[str], between.match(text, end)).end()] != "]":
        _, end = json.JSONDecoder().raw_decode(text, start)
        rows.append(parse_json(text[start:end]))
    return rows


def _read_object_over_lines(file: "_TextFile") -> list[object] | None:
    """The list `data` of an object that takes several lines; None if the file is not one such object."""
    try:
        value = _load_json("".join(file.text()))
    except (json.JSONDecodeError, RecursionError, SettingsError):  # lines, which say themselves what is wrong
        return None
    rows = value.get("data")
    if not isinstance(rows, list):
        raise SettingsError(
            "it is one JSON object over several lines; expected one object per line, a list of objects, or an object "
            f"with such a list as `data`. It has {shorten(sorted(value), 200)}."
        )
    return rows


def _read_csv(file: "_TextFile", delimiter: str) -> Iterator[tuple[str, object]]:
    reader = csv.reader(file.text(), delimiter=delimiter, strict=True)
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


@dataclass(frozen=True)
class _TextFile:
    """A file of text, read from its start each time."""

    path: str
    kind: FileKind

    def lines(self) -> Iterator[tuple[int, str | UnreadableRow]]:
        """Its lines with their numbers, from 1; one that is no text is an unreadable row."""
        with self.kind.open(self.path) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield number, UnreadableRow(f"not UTF-8 text ({error.reason}). Save the file as UTF-8.")

    def filled_lines(self) -> Iterator[tuple[int, str | UnreadableRow]]:
        """Those lines that are not blank."""
        return ((number, line) for number, line in self.lines() if isinstance(line, UnreadableRow) or line.strip())

    def text(self) -> Iterator[str]:
        """Its lines, if it is a whole: one that is no text makes all of it unreadable."""
        for number, line in self.lines():
            if isinstance(line, UnreadableRow):
                raise SettingsError(f"line {number}: {line.problem}")
            yield line

    def first_character(self) -> str:
        """The first that is no white space, whatever follows it; empty if there is none."""
        with self.kind.open(self.path) as file:
            lines = (line.decode("utf-8-sig", errors="replace").strip() for line in file)
            return next(filter(None, lines), "")[:1]
