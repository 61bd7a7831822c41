"""Files of text, read row by row; what cannot be read is named with its location."""

import csv
import json
import re

import pytest
from support.rows import write, write_csv

from lightning_sft.data.rows.readers import UnreadableRow, read_file

LINES = [
    (name, content + ending)
    for ending in ("", "\n", "\r\n")
    for name, content in (
        ("rows.jsonl", '\n{"n": "1"}\n \t\n{"n": "2"}\r\n\n{"n": "3"}'),
        ("rows.json", '{"n": "1"}\n{"n": "2"}\n{"n": "3"}'),
        ("rows.json", ' \r\n[{"n": "1"},\n {"n": "2"}, {"n": "3"}\n] '),
        ("rows.csv", '\nn\n1\n\r\n"2"\n3'),
    )
]


@pytest.mark.parametrize(("name", "content"), LINES)
def test_rows_have_locations_and_may_be_skipped(tmp_path, name, content):
    path = write(tmp_path / name, content)
    rows = list(read_file(path))
    assert [row for _, row in rows] == [{"n": "1"}, {"n": "2"}, {"n": "3"}]
    lines = [2, 4, 6] if name == "rows.jsonl" else [1, 2, 3]
    word = "line" if content.lstrip().startswith("{") else "row"
    assert [location for location, _ in rows] == [f"{word} {number}" for number in lines]
    for skip in range(5):
        assert list(read_file(path, skip)) == rows[skip:]


def test_lines_that_are_skipped_are_not_parsed(tmp_path):
    path = write(tmp_path / "rows.jsonl", 'no JSON\n{"n": 1}\n')
    assert list(read_file(path, 1)) == [("line 2", {"n": 1})]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_only_a_line_feed_ends_a_line(tmp_path, name):
    text = "a\u2028b\u2029c\x85d"
    line = f"n\n{text}" if name == "rows.csv" else json.dumps({"n": text}, ensure_ascii=False)
    assert [row for _, row in read_file(write(tmp_path / name, line + "\n"))] == [{"n": text}]


def test_a_long_field_of_a_csv_file_is_read_and_the_limit_of_other_readers_is_left_alone(tmp_path):
    path = write_csv(tmp_path / "rows.csv", {"n": "a" * 140_000})
    limit = csv.field_size_limit(100)
    try:
        assert [len(row["n"]) for _, row in read_file(path)] == [140_000]
        assert csv.field_size_limit() == 100
    finally:
        csv.field_size_limit(limit)


GOOD = b'{"prompt": "a", "output": "b"}\n'
UNREADABLE = {
    "empty JSON": ("rows.json", b"", "it has no rows."),
    "empty CSV": ("rows.csv", b"", "it has no rows."),
    "blank lines": ("rows.jsonl", b"\n \r\n\n", "it has no rows."),
    "header alone": ("rows.csv", b"prompt,output\n", "it has no rows."),
    "list of nothing": ("rows.json", b" []", "it has no rows."),
    "JSON list with more behind it": ("rows.json", b'[{"prompt": "a"}]\n, {}]', "Extra data: line 2 column 1"),
    "JSON list with a name twice, not closed": ("rows.json", b'[{"n": 1, "n": 2}', "Expecting ',' delimiter: line 1"),
    "JSON object with a name twice": ("rows.json", b'{\n"data": [{"n": 1, "n": 1}]}', "an object has 'n' more than"),
    "JSON list without comma": ("rows.json", b'[{"prompt": "a"}\n{}]', "Expecting ',' delimiter: line 2 column 1"),
    "Latin-1 in JSON": (
        "rows.json",
        b"[\n" + '"ü"]'.encode("latin-1"),
        "line 2: not UTF-8 text (invalid start byte). Save the",
    ),
    "Latin-1 in CSV": ("rows.csv", 'prompt,output\n1,"a\nÄ"'.encode("latin-1"), "line 3: not UTF-8 text"),
    "stray quote": ("rows.csv", b'prompt,output\na,b\n"c"d,e\n', "line 3: ',' expected after '\"'."),
}


@pytest.mark.parametrize("problem", UNREADABLE)
def test_a_file_that_cannot_be_read_is_refused_with_the_line(tmp_path, problem):
    name, content, reason = UNREADABLE[problem]
    with pytest.raises(ValueError, match="^" + re.escape(reason)):
        list(read_file(write(tmp_path / name, content)))


NO_ROWS = {
    "no JSON": ("a.jsonl", b"prompt: a\n", "not valid JSON (Expecting value at column 1): 'prompt: a\\n'"),
    "half a row": ("a.jsonl", GOOD[:17] + b"\n", "not valid JSON (Invalid control character at column 18): "),
    "a name twice": (
        "a.jsonl",
        b'{"prompt": "a", "prompt": "b", "output": "c"}\n',
        "cannot be read as JSON: an object has 'prompt' more than once.",
    ),
    "null": ("a.jsonl", b"null\n", "expected a JSON object, got None."),
    "a number": ("a.json", b"5\n", "expected a JSON object, got 5."),
    "Latin-1": ("a.jsonl", '{"n": "ü"}\n'.encode("latin-1"), "not UTF-8 text (invalid start byte). Save the file as"),
    "nested without end": ("a.jsonl", b"[" * 100_000 + b"\n", "cannot be read as JSON: too deeply nested"),
    "too many fields": ("a.csv", b"c,d,e\n", "expected 2 fields, as in the header, got 3."),
    "too few fields": ("a.csv", b"c\n", "expected 2 fields, as in the header, got 1."),
}


@pytest.mark.parametrize("problem", NO_ROWS)
def test_what_is_no_row_stands_at_its_place_among_those_that_are(tmp_path, problem):
    name, content, reason = NO_ROWS[problem]
    good = b"a,b\n" if name == "a.csv" else GOOD
    path = write(tmp_path / name, (b"prompt,output\n" if name == "a.csv" else b"") + good + content + good)
    first, second, third = read_file(path)
    word = "row" if name == "a.csv" else "line"
    assert (first, third) == ((f"{word} 1", first[1]), (f"{word} 3", first[1]))
    assert second[0] == f"{word} 2"
    assert second[1].problem.startswith(reason)
    assert list(read_file(path, 1)) == [second, third]


@pytest.mark.parametrize("content", ['[{"n": 1}, 5]', '{\n"data": [{"n": 1}, 5]}'])
def test_a_list_may_hold_what_is_no_row(tmp_path, content):
    path = write(tmp_path / "rows.json", content)
    assert list(read_file(path)) == [("row 1", {"n": 1}), ("row 2", UnreadableRow("expected a JSON object, got 5."))]


def test_a_row_of_a_list_that_has_a_name_twice_stands_at_its_place(tmp_path):
    path = write(tmp_path / "rows.json", ' [\n{"n": "]"} , {"a": [{"n": 1, "n": 2}]},\n5, {"n": 3}\n]\n')
    (_, first), (location, second), (_, third), fourth = read_file(path)
    assert (first, location, fourth) == ({"n": "]"}, "row 2", ("row 4", {"n": 3}))
    assert second == UnreadableRow("cannot be read as JSON: an object has 'n' more than once.")
    assert third == UnreadableRow("expected a JSON object, got 5.")
