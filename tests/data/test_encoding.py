import codecs
import copy
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from support.models import character_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lightning_sft.data import encoded_rows, encoding
from lightning_sft.data.encoded_rows import (
    EncodedRows,
    content_hash,
    encode_rows,
    hash_of_examples,
    read_numbers,
    rows_in_memory,
)
from lightning_sft.data.encoding import Encoding, RowEncoder
from lightning_sft.data.row_format import PlainPrompt, PlainRow, RowFormat
from lightning_sft.data.sources import open_sources
from lightning_sft.data.tokenization import encode_examples


def encode(data: object, tokenizer: PreTrainedTokenizerFast | None = None, **options: object) -> EncodedRows:
    row_format = RowFormat(**{name: options.pop(name) for name in RowFormat.__dataclass_fields__ if name in options})
    num_proc = options.pop("num_proc", None)
    tokenizer = tokenizer or character_tokenizer()
    return encode_rows(open_sources(data, "train_data"), row_format, tokenizer, Encoding(**options), num_proc)


def refusal(data: object, error: type[Exception] = ValueError, **options: object) -> str:
    with pytest.raises(error) as caught:
        encode(data, **options)
    assert issubclass(caught.type, error)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_lines(path: Path, *rows: object) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, *rows: dict[str, str], encoding: str = "utf-8") -> str:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path: Path, *rows: dict[str, object]) -> str:
    pd.DataFrame(rows).to_parquet(path)
    return str(path)


# -- every kind of data, the same rows ---------------------------------------------------------------------------------

ROWS = [
    {"prompt": "Hi,", "output": "007", "ground_truth": "7.0"},
    {"prompt": 'a\n"b"', "output": "NA", "ground_truth": "2020-01-01"},
    {"prompt": "12", "output": "2020-01-01", "ground_truth": "null"},
]
ENCODED = {
    "prompt": ["Hi,", 'a\n"b"', "12"],
    "output": ["007", "NA", "2020-01-01"],
    "ground_truth": ["7.0", "2020-01-01", "null"],
    "input_ids": [
        [72, 105, 44, 48, 48, 55, 128],
        [97, 10, 34, 98, 34, 78, 65, 128],
        [49, 50, 50, 48, 50, 48, 45, 48, 49, 45, 48, 49, 128],
    ],
    "is_chat": [False, False, False],
    "num_prompt_tokens": [3, 5, 2],
    "excluded_spans": [[], [], []],
    "num_tokens": [7, 8, 13],
    "num_response_tokens": [4, 3, 11],
}


def encoded(rows: object) -> dict[str, list]:
    """The columns but for `location`, which differs with the kind of file."""
    return {name: values for name, values in rows.dataset[:].items() if name != "location"}


def jsonl_with_blank_lines(folder: Path) -> str:
    first, second, third = map(json.dumps, ROWS)
    return write(folder / "rows.jsonl", f"\n{first}\n\n \t\n{second}\r\n{third}")


def json_list_with_mark(folder: Path) -> str:
    return write(folder / "rows.json", codecs.BOM_UTF8 + b"\r\n" + json.dumps(ROWS).encode())


def csv_with_an_index_and_blank_lines(folder: Path) -> str:
    return write(folder / "rows.csv", "\n" + pd.DataFrame(ROWS).to_csv() + "\n\r\n")


def several_files(folder: Path) -> list[str]:
    return [write_lines(folder / "2.jsonl", ROWS[0]), write_csv(folder / "1.csv", *ROWS[1:])]


def pattern(folder: Path) -> str:
    (folder / "d.jsonl").mkdir()
    write_csv(folder / "b.csv", ROWS[1])
    write_lines(folder / "c.jsonl", ROWS[2])
    write_lines(folder / "a.jsonl", ROWS[0])
    return str(folder / "*")


def folder_of_a_data_set(folder: Path) -> str:
    write_parquet(folder / "train.parquet", *ROWS)
    write_parquet(folder / "test.parquet", *ROWS[1:])
    return str(folder)


DATA: dict[str, Callable[[Path], object]] = {
    "JSONL": lambda folder: write_lines(folder / "rows.jsonl", *ROWS),
    "JSONL with blank lines": jsonl_with_blank_lines,
    "JSONL with a mark": lambda folder: write(
        folder / "rows.jsonl", codecs.BOM_UTF8 + "\n".join(map(json.dumps, ROWS)).encode()
    ),
    "JSON list": lambda folder: write(folder / "rows.json", json.dumps(ROWS, indent=2)),
    "JSON list with a mark": json_list_with_mark,
    "JSON lines in .json": lambda folder: write_lines(folder / "rows.json", *ROWS),
    "CSV": lambda folder: write_csv(folder / "rows.csv", *ROWS),
    "CSV with a mark": lambda folder: write_csv(folder / "rows.csv", *ROWS, encoding="utf-8-sig"),
    "CSV with an index and blank lines": csv_with_an_index_and_blank_lines,
    "Parquet": lambda folder: write_parquet(folder / "rows.parquet", *ROWS),
    "path": lambda folder: Path(write_lines(folder / "rows.jsonl", *ROWS)),
    "JSONL named like a pattern": lambda folder: write_lines(folder / "rows[1].jsonl", *ROWS),
    "Parquet named like a pattern": lambda folder: write_parquet(folder / "rows[1].parquet", *ROWS),
    "list of files": several_files,
    "pattern": pattern,
    "folder": folder_of_a_data_set,
    "folder and split": lambda folder: folder_of_a_data_set(folder) + "::train",
    "folder, configuration and slice": lambda folder: folder_of_a_data_set(folder) + ":default:train[:3]",
    "list of dictionaries": lambda folder: ROWS,
    "tuple of mappings": lambda folder: tuple(map(MappingProxyType, ROWS)),
    "data set": lambda folder: Dataset.from_list(ROWS),
    "formatted data set": lambda folder: Dataset.from_list(ROWS).with_format("arrow"),
    "part of a data set": lambda folder: Dataset.from_list([ROWS[1], *ROWS]).select([1, 0, 3]),
}


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_gives_the_same_rows(tmp_path, kind):
    rows = encode(DATA[kind](tmp_path))
    assert encoded(rows) == ENCODED
    assert (rows.num_dropped, rows.num_truncated) == (0, 0)


def test_columns_that_are_not_asked_for_may_hold_anything():
    extras = [None, 3, {"of": [date(2020, 1, 1)]}]
    assert encoded(encode([{"extra": extra} | row for row, extra in zip(ROWS, extras, strict=True)])) == ENCODED
    assert encoded(encode([ROWS[0] | {"only here": 1}, *ROWS[1:]])) == ENCODED


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_only_a_line_feed_ends_a_line(tmp_path, name):
    text = "a\u2028b\u2029c\x85d"
    line = f"prompt,output\np,{text}" if name == "rows.csv" else f'{{"prompt": "p", "output": "{text}"}}'
    assert encode(write(tmp_path / name, line + "\n")).dataset["output"][:] == [text]


def test_a_long_field_of_a_csv_file_is_read_and_the_limit_of_other_readers_is_left_alone(tmp_path):
    path = write_csv(tmp_path / "rows.csv", {"prompt": "a" * 140_000, "output": "b"})
    limit = csv.field_size_limit(100)
    try:
        assert encode(path).dataset["num_tokens"][:] == [140_002]
        assert csv.field_size_limit() == 100
    finally:
        csv.field_size_limit(limit)


def test_the_rows_of_several_sources_stand_one_after_another(tmp_path):
    folder = folder_of_a_data_set(tmp_path)
    assert encode([f"{folder}::test", f"{folder}/train.parquet"]).dataset["prompt"][:] == [
        'a\n"b"',
        "12",
        *ENCODED["prompt"],
    ]


# -- files that cannot be read -----------------------------------------------------------------------------------------

GOOD = b'{"prompt": "a", "output": "b"}\n'
UNREADABLE = {
    "empty JSONL": ("rows.jsonl", b"", "it has no rows."),
    "empty JSON": ("rows.json", b"", "it has no rows."),
    "empty CSV": ("rows.csv", b"", "it has no rows."),
    "empty Parquet": ("rows.parquet", b"", "Parquet file size is 0 bytes"),
    "blank lines": ("rows.jsonl", b"\n \r\n\n", "it has no rows."),
    "header alone": ("rows.csv", b"prompt,output\n", "it has no rows."),
    "list of nothing": ("rows.json", b" []", "it has no rows."),
    "cut JSON": (
        "rows.jsonl",
        GOOD + b'\n{"prompt": "a"\n',
        "line 3: not valid JSON (Expecting ',' delimiter at column",
    ),
    "no JSON": ("rows.jsonl", b"prompt: a\n", "line 1: not valid JSON (Expecting value at column 1): 'prompt: a\\n'"),
    "cut JSON list": ("rows.json", b'[{"prompt": "a"},\n{"prompt"]', "Expecting ':' delimiter: line 2 column 10"),
    "JSON list with more behind it": ("rows.json", b'[{"prompt": "a"}]\n, {}]', "Extra data: line 2 column 1"),
    "JSON list without comma": ("rows.json", b'[{"prompt": "a"}\n{}]', "Expecting ',' delimiter: line 2 column 1"),
    "line without object": ("rows.jsonl", GOOD + b"[1, 2]", "line 2: expected a JSON object, got [1, 2]."),
    "null line": ("rows.jsonl", b"null\n", "line 1: expected a JSON object, got None."),
    "row without object": ("rows.json", b'[{"prompt": "a"}, 5]', "row 2: expected a JSON object, got 5."),
    "Latin-1 in JSONL": (
        "rows.jsonl",
        GOOD * 2 + '"é"'.encode("latin-1"),
        "line 3: not UTF-8 text (invalid continuation byte)",
    ),
    "Latin-1 in JSON": (
        "rows.json",
        b"[\n" + '"ü"]'.encode("latin-1"),
        "line 2: not UTF-8 text (invalid start byte). Save the",
    ),
    "Latin-1 in CSV": ("rows.csv", 'prompt,output\n1,"a\nÄ"'.encode("latin-1"), "line 3: not UTF-8 text"),
    "UTF-16": ("rows.jsonl", GOOD.decode().encode("utf-16"), "line 1: not UTF-8 text (invalid start byte)"),
    "field too many": (
        "rows.csv",
        b"prompt,output\na,b\nc,d,e\n",
        "row 2: expected 2 fields, as in the header, got 3.",
    ),
    "field too many everywhere": (
        "rows.csv",
        b"prompt,output\na,b,c\n",
        "row 1: expected 2 fields, as in the header, got 3.",
    ),
    "field too few": ("rows.csv", b"prompt,output\na,b\nc\n", "row 2: expected 2 fields, as in the header, got 1."),
    "open quote": ("rows.csv", b'prompt,output\na,"b\n', "line 2: unexpected end of data."),
    "stray quote": ("rows.csv", b'prompt,output\na,b\n"c"d,e\n', "line 3: ',' expected after '\"'."),
    "corrupt Parquet": ("rows.parquet", b"PAR1" + b"x" * 100, "Parquet magic bytes not found in footer"),
}


@pytest.mark.parametrize("problem", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_the_place_and_the_reason(tmp_path, problem):
    name, content, reason = UNREADABLE[problem]
    path = write(tmp_path / name, content)
    assert f"`train_data`: cannot read {path}: {reason}" in refusal(
        [write_lines(tmp_path / "good.jsonl", ROWS[0]), path]
    )


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "*.jsonl", "**/rows[0-9]*"])
def test_a_missing_file_and_a_pattern_without_match_are_named(tmp_path, name):
    message = refusal(str(tmp_path / name), FileNotFoundError)
    assert message == f"`train_data` is '{tmp_path / name}', but there is no such file."


@pytest.mark.parametrize("name", ["rows.txt", "rows.JSONL", "rows"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    for data in (write(tmp_path / name, GOOD), str(tmp_path / "row*")):
        message = refusal(data)
        assert (
            message == f"`train_data` is '{tmp_path / name}'; expected a file ending in .jsonl, .json, .csv, .parquet."
        )


def test_a_folder_that_is_no_data_set_is_refused_with_the_reason(tmp_path):
    message = refusal(str(tmp_path))
    assert f"`train_data` is '{tmp_path}': neither a file (.jsonl, .json, .csv, .parquet) nor a data set" in message
    assert "doesn't contain any data files" in message


@pytest.mark.parametrize(
    "data", [[], (), Dataset.from_dict({"prompt": [], "output": []})], ids=["list", "tuple", "data set"]
)
def test_no_rows_are_refused(data):
    assert refusal(data) == "`train_data` has no rows; expected at least one."


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (5, "5 of type int"),
        ([1, 2], "[1, 2] of type list"),
        ([ROWS[0], "rows.jsonl"], "of type list"),
        (ROWS[0], "of type dict"),
        (DatasetDict(train=Dataset.from_list(ROWS)), "of type DatasetDict"),
        (pd.DataFrame(ROWS), "of type DataFrame"),
    ],
)
def test_anything_else_is_refused_with_what_is_expected(data, kind):
    message = refusal(data, TypeError)
    assert kind in message
    assert message.startswith("`train_data` is ")
    assert message.endswith(
        "expected a file, a data set's name, a list of these, a `datasets.Dataset`, or a list of dictionaries."
    )


# -- rows that are malformed -------------------------------------------------------------------------------------------

ABSENT = object()
BAD_VALUES = {
    "absent": (ABSENT, "no value for `{field}` (`{argument}`). The row has ["),
    "null": (None, "no value for `{field}` (`{argument}`). The row has ['answer', 'output', 'prompt']."),
    "number": (7, "`{field}` (`{argument}`) is 7 of type int, expected a string."),
    "list": (["a"], "`{field}` (`{argument}`) is ['a'] of type list, expected a string."),
    "long": (
        [1] * 99,
        "`{field}` (`{argument}`) is [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ... of type list, expected",
    ),
    "lone surrogate": ("a\ud800", "`{field}` (`{argument}`) holds a lone surrogate, which is not text: 'a\\ud800'."),
}


@pytest.mark.parametrize("problem", BAD_VALUES)
@pytest.mark.parametrize(
    ("field", "argument"),
    [("prompt", "prompt_field"), ("output", "output_field"), ("answer", "ground_truth_field")],
)
def test_a_bad_value_is_named_with_file_line_and_field(tmp_path, field, argument, problem):
    good = {"prompt": "a", "output": "b", "answer": "c"}
    value, words = BAD_VALUES[problem]
    bad = {name: text for name, text in (good | {field: value}).items() if text is not ABSENT}
    words = words.format(field=field, argument=argument)

    path = write(tmp_path / "rows.jsonl", f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    assert f"line 3 of {path}: {words}" in refusal(path, ground_truth_field="answer")
    path = write(tmp_path / "rows.json", json.dumps([good, bad]))
    assert f"row 2 of {path}: {words}" in refusal(path, ground_truth_field="answer")
    assert f"row 2 of `train_data`: {words}" in refusal([good, bad], ground_truth_field="answer")


def test_a_bad_value_is_named_in_every_other_kind_of_data_too(tmp_path):
    numbers = [{"prompt": "a", "output": 1}]
    path = write_parquet(tmp_path / "rows.parquet", *numbers)
    assert f"row 1 of {path}: `output` (`output_field`) is 1 of type int" in refusal(path)
    assert f"row 1 of {tmp_path}: `output` (`output_field`) is 1 of type int" in refusal(str(tmp_path))
    assert "row 1 of `train_data`: `output` (`output_field`) is 1 of type int" in refusal(Dataset.from_list(numbers))
    path = write_csv(tmp_path / "rows.csv", ROWS[0], ROWS[1])
    assert f"row 1 of {path}: no value for `answer` (`ground_truth_field`)" in refusal(
        path, ground_truth_field="answer"
    )


def test_a_row_is_counted_from_the_start_of_its_file_however_many_rows_come_before(tmp_path):
    rows = [{"prompt": "a", "output": "b"}] * 1500
    last = write_lines(tmp_path / "z.jsonl", *rows, {"prompt": "a"})
    assert f"line 1501 of {last}: no value for `output`" in refusal([write_lines(tmp_path / "a.jsonl", *rows), last])
    assert "row 1501 of `train_data`: no value for `output`" in refusal(Dataset.from_list([*rows, {"prompt": "a"}]))


def test_a_value_that_json_cannot_hold_does_not_become_text():
    message = refusal([{"prompt": "a", "output": date(2020, 1, 1)}])
    assert "row 1 of `train_data`: `output` (`output_field`) is {'date': 'datetime.date(2020, 1, 1)'}" in message


def test_a_type_that_datasets_guesses_is_refused_and_never_turned_back_into_other_text(tmp_path):
    write_lines(tmp_path / "train.jsonl", {"prompt": "a", "output": "2020-01-01"})
    message = refusal(str(tmp_path))
    assert f"row 1 of {tmp_path}: `output` (`output_field`) is datetime" in message
    assert "expected a string" in message
    assert encode(str(tmp_path / "*.jsonl")).dataset["output"][:] == ["2020-01-01"]


def test_a_row_without_response_token_is_refused_with_the_way_out(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS[0], {"prompt": "a", "output": ""})
    assert refusal(path, append_eos=False) == (
        f"line 2 of {path}: no response token to learn from; `output` is ''. Remove the row, or set `append_eos=True`."
    )
    assert encode(path).dataset[1]["input_ids"] == [97, 128]


def test_a_first_token_without_anything_before_it_is_no_response_token():
    rows = [{"prompt": "", "output": "a"}]
    assert "row 1 of `train_data`: no response token to learn from; `output` is 'a'." in refusal(rows, append_eos=False)
    assert encode(rows).dataset[0]["num_response_tokens"] == 1
    assert encode(rows, character_tokenizer(bos=True), append_eos=False).dataset[0]["input_ids"] == [129, 97]


# -- which columns, and how the prompt is written ----------------------------------------------------------------------


def test_the_ground_truth_is_the_output_unless_the_row_has_one():
    rows = [{"prompt": "a", "output": "b"} | more for more in ({}, {"ground_truth": None}, {"ground_truth": ""})]
    assert encode(rows).dataset["ground_truth"][:] == ["b", "b", ""]
    assert [RowFormat().render_prompt(row).ground_truth for row in rows] == [None, None, ""]


def test_a_ground_truth_that_is_no_string_is_refused_in_the_default_column_too():
    message = refusal([{"prompt": "a", "output": "b", "ground_truth": 4}])
    assert "`ground_truth` (`ground_truth_field`) is 4 of type int, expected a string." in message


def test_columns_are_taken_by_the_names_given():
    row = {"q": "a", "a": "b", "answer": "c", "prompt": 1, "output": 2, "ground_truth": 3}
    names = {"prompt_field": "q", "output_field": "a", "ground_truth_field": "answer"}
    assert RowFormat(**names).render(row) == PlainRow(prompt="a", output="b", ground_truth="c")
    assert encode([row], **names).dataset[0]["input_ids"] == [97, 98, 128]


def test_a_prompt_alone_needs_no_output():
    assert RowFormat().render_prompt({"prompt": "a"}) == PlainPrompt(prompt="a", ground_truth=None)
    with pytest.raises(ValueError, match="no value for `answer`"):
        RowFormat(ground_truth_field="answer").render_prompt({"prompt": "a"})


TEMPLATES = {
    "{a}": "x",
    "Q: {a}\n": "Q: x\n",
    "{a}{b} {a}": "x{y} x",
    "{{{a}}} {{b}}": "{x} {b}",
    "}}{a}": "}x",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_filled_with_columns_and_doubled_braces_are_literal(template):
    row = {"a": "x", "b": "{y}", "output": "z"}
    assert RowFormat(prompt_template=template).render(row).prompt == TEMPLATES[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_may_come_from_a_file_whose_last_line_break_is_dropped(tmp_path, template):
    row = {"a": "x", "b": "{y}", "output": "z"}
    for ending in ("\n", "\r\n"):
        path = write(tmp_path / "template.txt", codecs.BOM_UTF8 + (template + ending).encode())
        assert RowFormat(prompt_template=path).render(row).prompt == TEMPLATES[template]
    assert RowFormat(prompt_template=write(tmp_path / "no_end", "{a}")).render(row).prompt == "x"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{a} {}",
            "`prompt_template` has {}, but expects plain column names such as {question}. Write literal braces twice.",
        ),
        ("{a} {0}", "has {0}, but expects plain column names"),
        ("{a.b}", "has {a.b}, but expects plain column names"),
        ("{a[0]}", "has {a[0]}, but expects plain column names"),
        ("{a!r}", "has {a!r}, but expects plain column names"),
        ("{a:>5}", "has {a:>5}, but expects plain column names"),
        ("{a:{b}}", "has {a:{b}}, but expects plain column names"),
        ('{"answer": 1} {a}', 'has {"answer": 1}, but expects plain column names'),
        (
            "{a",
            "`prompt_template` has unbalanced braces (expected '}' before end of string). Write literal braces twice.",
        ),
        ("{a}}", "has unbalanced braces (Single '}' encountered in format string)"),
        ("{{a}}", "`prompt_template` has no {column} in it, so all prompts would be the same."),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_at_once(template, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RowFormat(prompt_template=template)


@pytest.mark.parametrize("template", ["missing.txt", "Solve the problem. " * 50, "Question }"])
def test_a_template_that_is_neither_text_with_a_column_nor_a_file_is_refused(template):
    words = (
        f"`prompt_template` is {template!r}, which has no {{column}} in it and is no file either. Give a text such as"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        RowFormat(prompt_template=template)


def test_a_template_with_an_unknown_column_names_row_and_column(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS[0])
    message = refusal(path, prompt_template="{prompt} {question}")
    assert f"line 1 of {path}: no value for `question` (`prompt_template`). The row has [" in message
    assert "line 1 of" in refusal(write_lines(tmp_path / "n.jsonl", {"n": 1, "output": "a"}), prompt_template="{n}")


# -- row_transform -----------------------------------------------------------------------------------------------------


def test_the_transform_is_applied_first_and_to_a_copy():
    def transform(row: dict[str, object]) -> dict[str, object]:
        row["output"] = f"{row.pop('n')}!"
        return row

    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    assert encode(rows, row_transform=transform).dataset["input_ids"][:] == [[97, 49, 33, 128], [98, 50, 33, 128]]
    assert RowFormat(row_transform=transform).render_prompt(rows[0]) == PlainPrompt("a", None)
    assert rows == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_a_transform_gets_the_values_of_a_data_set_with_their_types(tmp_path):
    def transform(row: dict[str, object]) -> dict[str, object]:
        return {"prompt": row["day"].strftime("%d"), "output": ",".join(map(str, row["steps"]))}

    path = write_parquet(tmp_path / "rows.parquet", {"day": pd.Timestamp("2020-03-04"), "steps": [1, 2]})
    for data in (path, Dataset.from_parquet(path)):
        assert encode(data, row_transform=transform).dataset["input_ids"][:] == [[48, 52, 49, 44, 50, 128]]


class HeldBackError(Exception):
    """Cannot be pickled and read back, as it needs two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raise_held_back(row: dict[str, object]) -> dict[str, object]:
    raise HeldBackError("not ", "today")


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (lambda row: {"prompt": row["question"]}, "`row_transform` failed: KeyError: 'question'"),
        (lambda row: 1 / 0, "`row_transform` failed: ZeroDivisionError: division by zero"),
        (raise_held_back, "`row_transform` failed: HeldBackError: not today"),
        (lambda row: None, "`row_transform` returned None, expected a dictionary."),
        (lambda row: "a", "`row_transform` returned 'a', expected a dictionary."),
        (lambda row: {1: "a", "prompt": "b"}, "no value for `output` (`output_field`). The row has ['1', 'prompt']."),
    ],
)
def test_a_transform_that_fails_is_named_with_file_and_line(tmp_path, transform, words):
    path = write(tmp_path / "rows.jsonl", b"\n" + GOOD)
    assert refusal(path, row_transform=transform) == f"line 2 of {path}: {words}"


def test_the_failure_of_a_transform_keeps_its_traceback():
    with pytest.raises(ValueError, match="HeldBackError") as caught:
        encode(ROWS, row_transform=raise_held_back)
    assert isinstance(caught.value.__cause__, HeldBackError)
    assert caught.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == "raise_held_back"


# -- max_length --------------------------------------------------------------------------------------------------------

LENGTHS = [
    {"prompt": "ab", "output": "c"},  # 4 tokens with EOS
    {"prompt": "ab", "output": "cd"},  # 5
    {"prompt": "abc", "output": "def"},  # 7
    {"prompt": "abcd", "output": "e"},  # 6, of which 4 are the prompt
    {"prompt": "abcdef", "output": "g"},  # 8, of which 6 are the prompt
]


def test_a_row_as_long_as_max_length_is_kept_whole():
    for too_long in ("error", "drop", "truncate"):
        rows = encode(LENGTHS, max_length=8, too_long=too_long)
        assert rows.dataset[:] == encode(LENGTHS).dataset[:]
        assert rows.dataset["num_tokens"][:] == [4, 5, 7, 6, 8]
        assert (rows.num_dropped, rows.num_truncated) == (0, 0)


def test_a_longer_row_is_an_error_that_names_file_row_lengths_and_way_out(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *LENGTHS)
    assert refusal(path, max_length=7) == (
        f"line 5 of {path}: 8 tokens (6 of the prompt) exceed `max_length` = 7. "
        'Raise `max_length`, or set `too_long` to "drop" or "truncate".'
    )
    assert f"line 2 of {path}: 5 tokens (2 of the prompt) exceed `max_length` = 4." in refusal(path, max_length=4)


def test_longer_rows_are_dropped_and_counted():
    rows = encode(LENGTHS, max_length=5, too_long="drop")
    assert rows.dataset["input_ids"][:] == [[97, 98, 99, 128], [97, 98, 99, 100, 128]]
    assert rows.dataset["prompt"][:] == ["ab", "ab"]
    assert (rows.num_dropped, rows.num_truncated) == (3, 0)


def test_dropped_rows_are_not_stored_even_where_they_come_in_thousands():
    lengths = [9 if index < 1300 or index % 2 else 1 for index in range(2500)]
    rows = encode([{"prompt": "a" * length, "output": "b"} for length in lengths], max_length=5, too_long="drop")
    assert (len(rows.dataset), rows.num_dropped, rows.num_truncated) == (600, 1900, 0)
    assert len(rows.dataset.data) == 600


def test_longer_rows_are_cut_without_eos_and_those_without_room_for_a_response_are_dropped():
    rows = encode(LENGTHS, max_length=4, too_long="truncate")
    assert rows.dataset["input_ids"][:] == [[97, 98, 99, 128], [97, 98, 99, 100], [97, 98, 99, 100]]
    assert rows.dataset["num_prompt_tokens"][:] == [2, 2, 3]
    assert rows.dataset["num_tokens"][:] == [4, 4, 4]
    assert rows.dataset["num_response_tokens"][:] == [2, 2, 1]
    assert rows.dataset["output"][:] == ["c", "cd", "def"]
    assert (rows.num_dropped, rows.num_truncated) == (2, 2)


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_no_row_may_be_left(too_long):
    rows = encode(LENGTHS[3:], max_length=3, too_long=too_long)
    assert encoded(rows) == {column: [] for column in ENCODED}
    assert (rows.num_dropped, rows.num_truncated) == (2, 0)


def test_without_eos_there_is_one_token_less():
    rows = encode(LENGTHS[:2], max_length=4, append_eos=False)
    assert rows.dataset["input_ids"][:] == [[97, 98, 99], [97, 98, 99, 100]]
    assert rows.dataset["num_response_tokens"][:] == [1, 2]


def test_each_row_keeps_its_place_and_of_several_files_its_file(tmp_path):
    first = write(tmp_path / "a.jsonl", "\n".join(["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]))
    second = write_csv(tmp_path / "b.csv", ROWS[2])
    assert encode(first).dataset["location"][:] == ["line 2", "line 4"]
    assert encode([first, second]).dataset["location"][:] == [
        f"line 2 of {first}",
        f"line 4 of {first}",
        f"row 1 of {second}",
    ]


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenised(monkeypatch, tmp_path) -> list[str]:
    """The prompts tokenised so far; the cache is empty at first."""
    prompts: list[str] = []

    def spy(prompt_strs, *others):
        prompts.extend(prompt_strs)
        return encode_examples(prompt_strs, *others)

    monkeypatch.setattr(encoding, "encode_examples", spy)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return prompts


def data_folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("kind", DATA)
def test_no_row_is_tokenised_twice(tmp_path, tokenised, kind):
    data = DATA[kind](data_folder(tmp_path))
    encode(data)
    assert sorted(tokenised) == sorted(ENCODED["prompt"])
    assert encoded(encode(data)) == ENCODED
    assert len(tokenised) == 3


@pytest.mark.parametrize("kind", ["JSONL", "JSON list", "JSON lines in .json", "CSV", "Parquet"])
def test_the_same_content_in_another_file_is_not_tokenised_again(tmp_path, tokenised, kind):
    path = Path(DATA[kind](data_folder(tmp_path)))
    encode(path)
    os.utime(path, (1, 1))
    copy = shutil.copy(path, path.with_stem("copy"))
    assert encode(path).dataset[:] == encode(copy).dataset[:]
    assert encoded(encode(copy)) == ENCODED
    assert len(tokenised) == 3


def test_an_error_names_the_file_given_even_if_the_same_content_was_read_from_another_before(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", *ROWS)
    second = shutil.copy(first, tmp_path / "second.jsonl")
    for path in (first, second):
        assert refusal(path, max_length=7) == (
            f"line 2 of {path}: 8 tokens (5 of the prompt) exceed `max_length` = 7. "
            'Raise `max_length`, or set `too_long` to "drop" or "truncate".'
        )


@pytest.mark.parametrize(
    ("suffix", "write_rows"),
    [("jsonl", write_lines), ("json", write_lines), ("csv", write_csv), ("parquet", write_parquet)],
)
def test_a_changed_file_is_read_anew_even_with_size_and_time_of_the_old_one(tmp_path, tokenised, suffix, write_rows):
    path = tmp_path / f"rows.{suffix}"
    results = []
    for output in "bc":
        write_rows(path, {"prompt": "a", "output": output})
        os.utime(path, (1_000_000_000, 1_000_000_000))
        results += encode(str(path)).dataset["input_ids"][:]
    assert results == [[97, 98, 128], [97, 99, 128]]


def test_the_same_bytes_in_files_of_two_kinds_are_not_confused(tmp_path):
    content = '{"prompt": "a", "output": "b"}\n' * 2
    assert encode(write(tmp_path / "rows.jsonl", content)).dataset["input_ids"][:] == [[97, 98, 128]] * 2
    message = refusal(write(tmp_path / "rows.csv", content))
    assert f"row 1 of {tmp_path / 'rows.csv'}: no value for `prompt`" in message


def swapped_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer with the ids of `a` and `b` exchanged: the same tokens, another meaning."""
    content = json.loads(character_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"] |= {"a": 98, "b": 97}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<eos>")


def tokenizer_with_eos(token: str) -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer(pad=True)
    tokenizer.eos_token = token
    return tokenizer


CHANGES = {
    "nothing": ({}, [97, 98, 99, 100, 128]),
    "max_length": ({"max_length": 4, "too_long": "truncate"}, [97, 98, 99, 100]),
    "larger max_length": ({"max_length": 5, "too_long": "truncate"}, [97, 98, 99, 100, 128]),
    "too_long": ({"max_length": 4, "too_long": "drop"}, None),
    "append_eos": ({"append_eos": False}, [97, 98, 99, 100]),
    "prompt_field": ({"prompt_field": "other"}, [120, 99, 100, 128]),
    "output_field": ({"output_field": "other"}, [97, 98, 120, 128]),
    "template": ({"prompt_template": "{other}:"}, [120, 58, 99, 100, 128]),
    "other template": ({"prompt_template": "{other};"}, [120, 59, 99, 100, 128]),
    "transform": ({"row_transform": lambda row: row | {"prompt": "y"}}, [121, 99, 100, 128]),
    "other transform": ({"row_transform": lambda row: row | {"prompt": "z"}}, [122, 99, 100, 128]),
    "vocabulary": ({"tokenizer": swapped_tokenizer()}, [98, 97, 99, 100, 128]),
    "BOS": ({"tokenizer": character_tokenizer(bos=True)}, [129, 97, 98, 99, 100, 128]),
    "pad token": ({"tokenizer": tokenizer_with_eos("<eos>")}, [97, 98, 99, 100, 128]),
    "EOS": ({"tokenizer": tokenizer_with_eos("<pad>")}, [97, 98, 99, 100, 130]),
}


def test_a_change_of_anything_that_matters_is_never_served_old_ids(tmp_path, tokenised):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "ab", "output": "cd", "other": "x"})
    for again in (False, True):
        for change, (options, ids) in CHANGES.items():
            assert encode(path, **options).dataset["input_ids"][:] == ([] if ids is None else [ids]), change
            assert len(tokenised) == len(CHANGES) if again else list(CHANGES).index(change) + 1


def test_special_tokens_in_the_text_are_split_after_all_when_the_tokenizer_is_told_to(tokenised):
    rows = [{"prompt": "a", "output": "<pad>"}]
    assert encode(rows, tokenizer_with_eos("<eos>")).dataset["num_tokens"][:] == [3]
    splitting = tokenizer_with_eos("<eos>")
    splitting.split_special_tokens = True
    assert encode(rows, splitting).dataset["num_tokens"][:] == [7]


def test_an_edited_template_file_is_never_served_old_ids(tmp_path, tokenised):
    results = []
    for template in ("{prompt}?", "{prompt}!"):
        path = write(tmp_path / "template.txt", template)
        results += encode([{"prompt": "a", "output": "b"}], prompt_template=path).dataset["input_ids"][:]
    assert results == [[97, 63, 98, 128], [97, 33, 98, 128]]


@pytest.mark.parametrize("call", ["transform", "functools.partial(transform)", "Transform()", "Transform().apply"])
def test_an_edited_transform_is_never_served_old_ids(tmp_path, tokenised, monkeypatch, call):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    results = []
    for prompt in "xy":
        source = (
            "import functools\n"
            f"def transform(row): return dict(row, prompt={prompt!r})\n"
            "class Transform:\n"
            "    def __call__(self, row): return transform(row)\n"
            "    def apply(self, row): return transform(row)\n"
            f"chosen = {call}\n"
        )
        write(tmp_path / "transform_of_a_test.py", source)
        sys.modules.pop("transform_of_a_test", None)
        importlib.invalidate_caches()
        module = importlib.import_module("transform_of_a_test")
        for _ in range(2):
            results += encode([{"output": "b"}], row_transform=module.chosen).dataset["input_ids"][:]
    del sys.modules["transform_of_a_test"]
    assert results == [[120, 98, 128]] * 2 + [[121, 98, 128]] * 2
    assert tokenised == ["x", "y"]


def test_using_the_tokenizer_in_between_changes_nothing(tokenised):
    tokenizer = character_tokenizer(pad=True)
    encode(ROWS, tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.padding_side = "left"
    assert tokenizer.backend_tokenizer.padding
    assert tokenizer.backend_tokenizer.truncation
    assert encoded(encode(ROWS, tokenizer)) == ENCODED
    assert len(tokenised) == 3


class PythonTokenizer(PreTrainedTokenizer):
    """One token a letter, without the `tokenizers` library."""

    def __init__(self, letters: str, **options: object) -> None:
        self.letters = letters
        super().__init__(eos_token=letters[0], **options)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: index for index, letter in enumerate(self.letters)}

    def _tokenize(self, text: str, **options: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.index(token)


def test_a_tokenizer_written_in_python_is_known_by_its_vocabulary_and_options(tokenised):
    rows = [{"prompt": "a", "output": "b"}]
    for again in (False, True):
        assert encode(rows, PythonTokenizer(".ab")).dataset["input_ids"][:] == [[1, 2, 0]]
        assert encode(rows, PythonTokenizer(".ba")).dataset["input_ids"][:] == [[2, 1, 0]]
        assert encode(rows, PythonTokenizer(".ab", lower=True)).dataset["input_ids"][:] == [[1, 2, 0]]
        assert len(tokenised) == 3, again


def encode_in_three_ways(path: str) -> list[list[list[int]]]:
    rows = [row | {"more": {"z": 1, "y": {"x": "w"}}} for row in ROWS]
    options = {"prompt_template": "{prompt}.", "row_transform": copy.copy}
    tokenizer = character_tokenizer(bos=True, pad=True)
    return [
        encode(data, tokenizer, **options).dataset["input_ids"][:] for data in (path, rows, Dataset.from_list(rows))
    ]


IN_ANOTHER_PROCESS = """
import json, sys, test_encoding

def refuse(*_):
    raise AssertionError("tokenised again")

test_encoding.encoding.encode_examples = refuse
print(json.dumps(test_encoding.encode_in_three_ways(sys.argv[1])))
"""


def test_another_process_tokenises_nothing_again(tmp_path, tokenised):
    path = write_lines(tmp_path / "rows.jsonl", *ROWS)
    here = encode_in_three_ways(path)
    assert len(tokenised) == 9
    env = {
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONHASHSEED": "1",
    }
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, path]
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == here


# -- processes and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JSONL with blank lines", "Parquet", "list of dictionaries"])
def test_two_processes_give_the_same_rows_as_one(tmp_path, tokenised, kind):
    rows = encode(DATA[kind](data_folder(tmp_path)), num_proc=2)
    assert tokenised == []
    assert encoded(rows) == ENCODED


def fail_for_the_last(row: dict[str, object]) -> dict[str, object]:
    return raise_held_back(row) if row["prompt"] == "12" else row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ground_truth_field": "answer"}, "no value for `answer` (`ground_truth_field`). The row has ["),
        ({"max_length": 12}, "13 tokens (2 of the prompt) exceed `max_length` = 12."),
        ({"row_transform": fail_for_the_last}, "`row_transform` failed: HeldBackError: not today"),
    ],
)
def test_an_error_of_another_process_arrives_in_the_same_words(tmp_path, options, words):
    path = write_lines(tmp_path / "rows.jsonl", *({"answer": "a"} | row for row in ROWS[:2]), ROWS[2])
    message = refusal(path, num_proc=2, **options)
    assert message.startswith(f"line 3 of {path}: {words}")
    assert message == refusal(path, **options)


def test_text_and_ids_stay_on_disk(tmp_path, tokenised):
    num_rows, length = 6000, 5000
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for index in range(num_rows):
            file.write(f'{{"prompt": "a", "output": "b", "ground_truth": "{index:0{length}}"}}\n')
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = encode(str(path), max_length=3, too_long="drop").dataset
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == num_rows
    assert len(rows[num_rows - 1]["ground_truth"]) == length
    assert peak < num_rows * length * 0.8
    assert pa.total_allocated_bytes() - before < num_rows * length / 10


def test_numbers_are_those_of_the_rows_wherever_they_were_selected_from():
    rows = encode([{"prompt": "a" * (i % 5), "output": "b" * (1 + i % 3)} for i in range(20)]).dataset
    parts = rows.train_test_split(0.4, seed=1)
    for part in (rows, rows.select(range(3, 9)), parts["train"], parts["test"].select([5, 0, 5])):
        assert read_numbers(part, "num_tokens").tolist() == part["num_tokens"][:]


@pytest.mark.parametrize("num_rows_at_once", [1, 3, 10_000])
def test_examples_have_the_hash_of_the_data_set_that_holds_them(monkeypatch, num_rows_at_once):
    monkeypatch.setattr(encoded_rows, "_ROWS_HASHED_AT_ONCE", num_rows_at_once)
    encoder = RowEncoder(RowFormat(), character_tokenizer(), Encoding(max_length=9, too_long="truncate"))
    rows = encoder.encode((f"row {number}", row) for number, row in enumerate(ROWS * 2))
    assert len({len(row.example.input_ids) for row in rows}) == 3
    rows[0] = replace(rows[0], example=replace(rows[0].example, excluded_spans=[4, 5]))
    examples = [row.example for row in rows]
    assert hash_of_examples(examples) == content_hash(rows_in_memory(rows))
    assert hash_of_examples(examples) != hash_of_examples(examples[::-1])
    assert hash_of_examples(examples) != hash_of_examples([replace(examples[0], excluded_spans=[3, 5]), *examples[1:]])


def test_numbers_are_read_without_an_object_for_each_row():
    num_rows = 100_000
    rows = Dataset.from_dict({"number": np.arange(num_rows, dtype=np.int32)}).select(np.arange(num_rows)[::-1])
    tracemalloc.start()
    try:
        read_numbers(rows, "number")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / num_rows < 17


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", ("a/b", None, "train", None)),
        ("a/b:main:test", ("a/b", "main", "test", None)),
        ("a/b@v1.0:main:test[:10%]", ("a/b", "main", "test[:10%]", "v1.0")),
        ("a/b@v1.0::test", ("a/b", None, "test", "v1.0")),
    ],
)
def test_a_hub_name_has_configuration_split_and_revision(name, expected, monkeypatch):
    asked = []

    def load(path, config, *, split, revision, streaming):
        asked.append((path, config, split, revision))
        return Dataset.from_list([{"prompt": "a", "output": "b"}])

    monkeypatch.setattr("lightning_sft.data.sources.load_dataset", load)
    open_sources(name, "train_data")
    assert asked == [expected]
