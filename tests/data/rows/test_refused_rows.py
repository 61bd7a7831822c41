"""Files and rows that cannot be read or used: each is named with its place."""

import gzip
import io
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from support.models import character_tokenizer
from support.refusals import ROWS, Refusal, assert_clear, data, each, file, row, write
from support.untrusted import Payload, own_code, trace_of_payload

from lightning_sft import SFTDataModule
from lightning_sft.errors import MissingFileError, SettingsTypeError

GOOD = b'{"prompt": "a", "output": "b"}\n'
UNREADABLE = "`train_data`: cannot read {tmp}/"
NEITHER = "neither a file (.jsonl, .json, .csv, .tsv, .parquet) nor a data set that can be loaded: "
KIND_OF_FILE = (
    "expected a file ending in .jsonl, .json, .csv, .tsv, .parquet, perhaps with .gz, .bz2, .xz, .zst after it."
)
KINDS = "expected a file, a data set's name, a list of these, a `datasets.Dataset`, or a list of dictionaries."


ROWS_TABLE = pa.Table.from_pylist(ROWS)


def parquet(table: pa.Table = ROWS_TABLE) -> bytes:
    """The content of a file."""
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


def saved(folder: Path) -> str:
    DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> dict:
    row = {"prompt": "a", "output": "b"}
    row["itself"] = row
    return row


def talkative(row: dict) -> dict:
    raise LookupError("no such\n  column")


FILES = {
    "empty file": Refusal(file("a.jsonl", b""), UNREADABLE + "a.jsonl: it has no rows."),
    "missing file": Refusal(
        data(train_data="{tmp}/a.jsonl"),
        "`train_data` is '{tmp}/a.jsonl', but there is no such file.",
        MissingFileError,
    ),
    "no name": Refusal(data(train_data=" "), "`train_data` is ' '; expected a file or the name of a data set."),
    "file with a split": Refusal(
        data(train_data="{tmp}/a.jsonl::train"),
        "`train_data` is '{tmp}/a.jsonl::train', but a file has neither configuration nor split. Use '{tmp}/a.jsonl'.",
    ),
    "file of another kind": Refusal(
        file("a.pkl", pickle.dumps(ROWS)),
        "`train_data` is '{tmp}/a.pkl'; " + KIND_OF_FILE,
    ),
    "truncated gzip": Refusal(
        file("a.jsonl.gz", gzip.compress(GOOD)[:-9]),
        UNREADABLE + "a.jsonl.gz: Compressed file ended before the end-of-stream marker was reached",
    ),
    "damaged bzip2": Refusal(file("a.csv.bz2", b"BZh9" + bytes(20)), UNREADABLE + "a.csv.bz2: Invalid data stream"),
    "xz that is none": Refusal(
        file("a.json.xz", GOOD), UNREADABLE + "a.json.xz: Input format not supported by decoder"
    ),
    "truncated Zstandard": Refusal(
        file("a.tsv.zst", pa.compress(b"prompt\toutput\na\tb\n", "zstd", asbytes=True)[:-3]),
        UNREADABLE + "a.tsv.zst: Truncated compressed stream",
    ),
    "compressed Parquet": Refusal(
        file("a.parquet.gz", b"x"),
        "`train_data` is '{tmp}/a.parquet.gz', but Parquet is compressed within the file. Unpack it.",
    ),
    "compressed file of another kind": Refusal(
        data(train_data="{tmp}/*.gz"), "`train_data` is '{tmp}/*.gz', but there is no such file.", MissingFileError
    ),
    "TSV with a row too long": Refusal(
        file("a.tsv", "prompt\toutput\na\tb\tc\n"),
        "row 1 of {tmp}/a.tsv: expected 2 fields, as in the header, got 3.",
    ),
    "JSON object over several lines": Refusal(
        file("a.json", json.dumps({"version": 1, "rows": ROWS}, indent=1)),
        UNREADABLE
        + "a.json: it is one JSON object over several lines; expected one object per line, a list of objects, "
        "or an object with such a list as `data`. It has ['rows', 'version'].",
    ),
    "missing file behind an address": Refusal(
        data(train_data="memory://none/a.jsonl"),
        "`train_data` is 'memory://none/a.jsonl', but there is no such file.",
        MissingFileError,
    ),
    "pattern without match behind an address": Refusal(
        data(train_data="memory://none/*.jsonl"),
        "`train_data` is 'memory://none/*.jsonl', but there is no such file.",
        MissingFileError,
    ),
    "unknown protocol": Refusal(
        data(train_data="none://a/b.jsonl"),
        "`train_data` is 'none://a/b.jsonl', which cannot be reached: ValueError: Protocol not known: none",
    ),
    "protocol whose package is missing": Refusal(
        data(train_data="adl://a/b.jsonl"),
        "`train_data` is 'adl://a/b.jsonl', which cannot be reached: ImportError: ...",
    ),
    "address of no file": Refusal(
        data(train_data="memory://a/set"),
        "`train_data` is 'memory://a/set': " + NEITHER + "a URL must lead to a file, a pattern of files, or a "
        "folder written by `save_to_disk`. A hub data set is given by its name, such as `user/set`.",
    ),
    "saved folder without the split": Refusal(
        lambda folder: data(train_data=f"{saved(folder)}::dev")(folder),
        "`train_data` is '{tmp}/saved::dev': " + NEITHER + "it has no split 'dev', expected one of ['test'].",
    ),
    "saved folder without a training split": Refusal(
        lambda folder: data(train_data=saved(folder))(folder),
        "`train_data` is '{tmp}/saved': " + NEITHER + "it has no split 'train', expected one of ['test'].",
    ),
    "truncated JSONL": Refusal(
        file("a.jsonl", GOOD + GOOD[:17]),
        'line 2 of {tmp}/a.jsonl: not valid JSON (Unterminated string starting at column 17): \'{"prompt": "a", "\'',
    ),
    "truncated JSON": Refusal(
        file("a.json", b"[" + GOOD + b","), UNREADABLE + "a.json: Expecting value: line 2 column 2 (char 33)"
    ),
    "JSON that nests deep": Refusal(
        file("a.jsonl", GOOD + b"[" * 100_000),
        "line 2 of {tmp}/a.jsonl: cannot be read as JSON: too deeply nested (RecursionError).",
    ),
    "JSON with a number of 5,000 digits": Refusal(
        file("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}"),
        "line 1 of {tmp}/a.jsonl: cannot be read as JSON: Exceeds the limit (4300 digits)...",
    ),
    "CSV with a row too long": Refusal(
        file("a.csv", "prompt,output\na,b,c\n"),
        "row 1 of {tmp}/a.csv: expected 2 fields, as in the header, got 3.",
    ),
    "CSV with an open quote": Refusal(
        file("a.csv", 'prompt,output\na,"b\n'), UNREADABLE + "a.csv: line 2: unexpected end of data."
    ),
    "CSV with a column twice": Refusal(
        file("a.csv", "prompt,output,output\na,b,c\n"),
        UNREADABLE + "a.csv: its header has 'output' more than once. Rename all but one.",
    ),
    "CSV with carriage returns alone": Refusal(
        file("a.csv", "prompt,output\ra,b\r"),
        UNREADABLE + "a.csv: line 1: a carriage return in a field without quotes. Quote the field, or end lines with a "
        "line feed.",
    ),
    "truncated Parquet": Refusal(
        file("a.parquet", parquet()[:-20]), UNREADABLE + "a.parquet: Parquet magic bytes not found in footer..."
    ),
    "damaged Parquet": Refusal(
        file("a.parquet", parquet()[:20] + bytes(40) + parquet()[60:]), UNREADABLE + "a.parquet: ..."
    ),
    "Parquet without rows": Refusal(
        file("a.parquet", parquet(ROWS_TABLE[:0])), UNREADABLE + "a.parquet: it has no rows."
    ),
    "Parquet with a column twice": Refusal(
        file("a.parquet", parquet(pa.table([["a"], ["b"], ["c"]], ["prompt", "output", "output"]))),
        UNREADABLE + "a.parquet: it has the column 'output' more than once. Rename all but one.",
    ),
    "streamed Parquet without rows": Refusal(
        file("a.parquet", parquet(ROWS_TABLE[:0]), streaming=True), UNREADABLE + "a.parquet: it has no rows."
    ),
    "streamed Parquet that is truncated": Refusal(
        file("a.parquet", parquet()[:-20], streaming=True),
        UNREADABLE + "a.parquet: Parquet magic bytes not found in footer...",
    ),
    "folder of nothing": Refusal(data(train_data="{tmp}"), "`train_data` is '{tmp}': " + NEITHER + "..."),
    "folder with a damaged file": Refusal(
        lambda folder: data(train_data=str(write(folder / "set/a.jsonl", '{"a": {').parent))(folder),
        "`train_data` is '{tmp}/set': " + NEITHER + "...",
    ),
    "folder without the split": Refusal(
        lambda folder: data(train_data=f"{write(folder / 'set/a.jsonl', GOOD).parent}::dev")(folder),
        "`train_data` is '{tmp}/set::dev': "
        + NEITHER
        + "ValueError: Unknown split \"dev\". Should be one of ['train'].",
    ),
    "part of a split that is empty": Refusal(
        lambda folder: data(train_data=saved(folder) + "::test[99:]")(folder),
        "`train_data` has no rows; expected at least one.",
    ),
    "no hub": Refusal(data(train_data="no/set"), "`train_data` is 'no/set': " + NEITHER + "ConnectionError: ..."),
    "Latin-1 JSONL": Refusal(
        file("a.jsonl", GOOD + '{"prompt": "é"}'.encode("latin-1")),
        "line 2 of {tmp}/a.jsonl: not UTF-8 text (invalid continuation byte). Save the file as UTF-8.",
    ),
    "UTF-16 CSV": Refusal(
        file("a.csv", "prompt,output\na,b\n".encode("utf-16")),
        UNREADABLE + "a.csv: line 1: not UTF-8 text (invalid start byte). Save the file as UTF-8.",
    ),
    "lone surrogate": Refusal(
        file("a.jsonl", rb'{"prompt": "a", "output": "\ud800"}'),
        "line 1 of {tmp}/a.jsonl: `output` (`output_field`) holds a lone surrogate, which is not text: '\\ud800'.",
    ),
}

FIELDS = {
    "line without object": Refusal(
        file("a.jsonl", GOOD + b"[1, 2]"), "line 2 of {tmp}/a.jsonl: expected a JSON object, got [1, 2]."
    ),
    "value alone in a JSON file": Refusal(
        file("a.json", '"abc"'), "line 1 of {tmp}/a.json: expected a JSON object, got 'abc'."
    ),
    "row without output": Refusal(
        row({"prompt": "a"}), "row 2 of `train_data`: no value for `output` (`output_field`). The row has ['prompt']."
    ),
    "row with a thousand other columns": Refusal(
        row({f"column_{number}": 1 for number in range(1000)}),
        "row 2 of `train_data`: no value for `prompt` (`prompt_field`). The row has ['column_0', ...",
    ),
    "prompt of null": Refusal(
        row({"prompt": None, "output": "b"}),
        "row 2 of `train_data`: no value for `prompt` (`prompt_field`). The row has ['output', 'prompt'].",
    ),
    "output of NaN": Refusal(
        file("a.jsonl", '{"prompt": "a", "output": NaN}'),
        "line 1 of {tmp}/a.jsonl: `output` (`output_field`) is nan of type float, expected a string.",
    ),
    "output of bytes": Refusal(
        row({"prompt": "a", "output": b"b"}),
        "row 2 of `train_data`: `output` (`output_field`) is {'bytes': \"b'b'\"} of type dict, expected a string.",
    ),
    "prompt of several texts": Refusal(
        row({"prompt": ["a", "b"], "output": "b"}),
        "row 2 of `train_data`: `prompt` (`prompt_field`) is ['a', 'b'] of type list, expected a string.",
    ),
    "conversation without a chat template": Refusal(
        row({"prompt": [{"role": "user", "content": "a"}], "output": "b"}),
        "row 2 of `train_data`: the row has messages (or `as_chat` makes them), but the tokenizer has no chat "
        "template. Pass `chat_template`: its text, a file, or a tokenizer that has one; or name the columns of a "
        "prompt and an output.",
    ),
    "ground truth of a number": Refusal(
        row({"prompt": "a", "output": "b", "ground_truth": 4}),
        "row 2 of `train_data`: `ground_truth` (`ground_truth_field`) is 4 of type int, expected a string.",
    ),
    "row in a circle": Refusal(
        data(train_data=[cyclic()]), "row 1 of `train_data`: cannot be written as JSON: Circular reference detected."
    ),
    "row with a tuple for a column": Refusal(
        row({("a", 1): "b"}),
        "row 2 of `train_data`: cannot be written as JSON: keys must be str, int, float, bool or None, not tuple.",
    ),
    "row that nests deep": Refusal(
        row({"prompt": "a", "output": "b", "more": nested(100_000)}),
        "row 2 of `train_data`: cannot be written as JSON: too deeply nested (RecursionError).",
    ),
    "rows without output or EOS": Refusal(
        row({"prompt": "a", "output": ""}, append_eos=False),
        "row 2 of `train_data`: no response token to learn from; the response is ''. Remove the row, or set "
        "`append_eos=True`.",
    ),
    "unknown prompt_field": Refusal(
        data(prompt_field="question"),
        "row 1 of `train_data`: no value for `question` (`prompt_field`). The row has ['output', 'prompt'].",
    ),
    "prompt_field of a number": Refusal(
        data(prompt_field=3), "`prompt_field` is 3 of type int, expected the name of a column.", SettingsTypeError
    ),
    "ground_truth_field of none": Refusal(
        data(ground_truth_field=None),
        "`ground_truth_field` is None of type NoneType, expected the name of a column.",
        SettingsTypeError,
    ),
    "transform that fails": Refusal(
        data(row_transform=lambda row: row["question"]),
        "row 1 of `train_data`: `row_transform` failed: KeyError: 'question'",
    ),
    "transform that says a lot": Refusal(
        data(row_transform=talkative), "row 1 of `train_data`: `row_transform` failed: LookupError: no such column"
    ),
    "transform that is no function": Refusal(
        data(row_transform="f"), "`row_transform` is 'f', expected a function.", SettingsTypeError
    ),
}

SOURCES = {
    "no data": Refusal(
        data(train_data=None), "`train_data` is needed for fit; expected a file, a data set or a list of rows."
    ),
    "no rows": Refusal(data(val_data=[]), "`val_data` has no rows; expected at least one."),
    "data of a number": Refusal(data(train_data=3.5), "`train_data` is 3.5 of type float; " + KINDS, SettingsTypeError),
    "data of bytes": Refusal(data(train_data=b"x"), "`train_data` is b'x' of type bytes; " + KINDS, SettingsTypeError),
    "data of one row": Refusal(
        data(train_data={"prompt": "a"}),
        "`train_data['prompt']` is 'a' of type str, expected a weight: how many times an epoch goes through its rows.",
        SettingsTypeError,
    ),
    "weight of a truth value": Refusal(
        data(train_data={"a.jsonl": True}),
        "`train_data['a.jsonl']` is True of type bool, expected a weight: how many times an epoch goes through "
        "its rows.",
        SettingsTypeError,
    ),
    "weight of zero": Refusal(
        data(train_data={"a.jsonl": 0}),
        "`train_data['a.jsonl']` is 0, expected a positive number: how many times an epoch goes through its rows. "
        "Leave the source out if it is not to be used.",
    ),
    "weight without end": Refusal(
        data(train_data={"a.jsonl": float("inf")}),
        "`train_data['a.jsonl']` is inf, expected a positive number: how many times an epoch goes through its rows. "
        "Leave the source out if it is not to be used.",
    ),
    "weight without a source": Refusal(
        data(train_data={3: 1}),
        "`train_data` is 3 of type int, expected a file or a data set's name before each weight.",
        SettingsTypeError,
    ),
    "weights of nothing": Refusal(
        data(train_data={}), "`train_data` is {}; expected at least one source with its weight."
    ),
    "sets of nothing": Refusal(
        data(val_data={}), "`val_data` is {}; expected at least one set, such as {name: source}."
    ),
    "weights of validation rows": Refusal(
        data(val_data={"a.jsonl": 2}),
        "`val_data` is {'a.jsonl': 2}, but weights are for `train_data` alone. Give a list of the sources, which are "
        "evaluated together, or `{name: source}` to evaluate each by itself, too.",
        SettingsTypeError,
    ),
    "sets of prompts": Refusal(
        data(predict_data={"easy": "a.jsonl"}),
        "`predict_data` is {'easy': 'a.jsonl'}, but only `val_data` and `test_data` may be several sets with names. "
        "Give a list of the sources.",
        SettingsTypeError,
    ),
    "a set whose name is a path": Refusal(
        data(test_data={"data/a.jsonl": "a.jsonl"}),
        "`test_data` has a set named 'data/a.jsonl', expected letters, digits and `_`, `-` or `.`, since its loss is "
        "to be called `test/<name>/loss`.",
    ),
    "a data set that transforms its rows": Refusal(
        data(train_data=Dataset.from_list(ROWS).with_transform(dict)),
        "`train_data` is a data set with a transform (`with_transform`), which would not be applied. Give it as "
        "`row_transform`, or apply it by `map`.",
    ),
    "rows that are streamed already": Refusal(
        data(train_data=Dataset.from_list(ROWS).to_iterable_dataset()),
        f"`train_data` is ... of type IterableDataset; {KINDS} To stream its rows, give its files or its name, "
        "and set `streaming` to true.",
        SettingsTypeError,
    ),
}


@each(FILES)
def test_a_file_that_cannot_be_read_is_refused_with_the_line(refusal, tmp_path):
    refusal.check(tmp_path)


@each(FIELDS)
def test_a_row_that_does_not_fit_is_refused_with_its_place(refusal, tmp_path):
    refusal.check(tmp_path)


@each(SOURCES)
def test_what_holds_no_rows_is_refused_with_what_does(refusal, tmp_path):
    refusal.check(tmp_path)


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.npy", "set/train.pkl", "set/train.npy", "set/set.py"])
def test_data_of_a_pickled_kind_is_not_read(tmp_path, name):
    trace = trace_of_payload(tmp_path)
    content = own_code(trace)["own.py"] if name.endswith(".py") else pickle.dumps(Payload(trace))
    path = write(tmp_path / name, content)
    source = str(path.parent if name.startswith("set") else path)
    with pytest.raises(ValueError, match=r"^`train_data` is ") as caught:
        SFTDataModule(character_tokenizer(), source).setup("fit")
    assert_clear(caught.value, source)
    assert not trace.exists()
