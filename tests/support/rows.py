"""Rows in every kind of file and collection, and what they are encoded to."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import fsspec
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from lightning_sft.data.encoded_rows import EncodedRows, encode_rows
from lightning_sft.data.encoding import Encoding, RowEncoder
from lightning_sft.data.rows.row_format import RowFormat
from lightning_sft.data.rows.sources import open_sources
from support.models import character_tokenizer


def encode(data: object, tokenizer: PreTrainedTokenizerFast | None = None, **options: object) -> EncodedRows:
    row_format = RowFormat(**{name: options.pop(name) for name in RowFormat.__dataclass_fields__ if name in options})
    num_proc = options.pop("num_proc", None)
    tokenizer = tokenizer or character_tokenizer()
    return encode_rows(
        open_sources(data, "train_data"), RowEncoder(row_format, tokenizer, Encoding(**options)), num_proc
    )


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
    "as_written": [False, False, False],
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


def write_tsv(path: Path, *rows: dict[str, str]) -> str:
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    return str(path)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def write_compressed(path: Path, content: bytes) -> str:
    """A file whose name says how it is compressed, in two parts, one after the other, as `cat a.gz b.gz` makes it."""
    half = len(content) // 2
    return write(path, b"".join(map(COMPRESS[path.suffix], (content[:half], content[half:]))))


def in_memory(name: str, content: bytes) -> str:
    """A file of `fsspec`'s file system in memory."""
    fsspec.filesystem("memory").pipe_file(f"/{name.lstrip('/')}", content)
    return f"memory://{name}"


def json_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pattern_in_memory(folder: Path) -> str:
    for number, name in enumerate(("b.jsonl", "a/c.jsonl.gz", "c.jsonl")):
        content = json_lines(ROWS[(1, 0, 2)[number]])
        in_memory(f"{folder}/{name}", gzip.compress(content) if name.endswith(".gz") else content)
    return f"memory://{folder}/**/*.jsonl*"


def parquet_in_memory(folder: Path) -> str:
    return in_memory(f"{folder}/rows.parquet", Path(write_parquet(folder / "rows.parquet", *ROWS)).read_bytes())


def saved(folder: Path) -> str:
    Dataset.from_list(ROWS).with_format("torch").save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def saved_splits(folder: Path) -> str:
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list([ROWS[1], *ROWS])}
    DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def saved_in_memory(folder: Path) -> str:
    Dataset.from_list(ROWS).save_to_disk(f"memory://{folder}/saved")
    return f"memory://{folder}/saved"


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
    "JSON object with data": lambda folder: write(folder / "rows.json", json.dumps({"version": 1, "data": ROWS})),
    "JSON object with data over several lines": lambda folder: write(
        folder / "rows.json", json.dumps({"data": ROWS}, indent=2)
    ),
    "TSV": lambda folder: write_tsv(folder / "rows.tsv", *ROWS),
    "JSONL in gzip": lambda folder: write_compressed(folder / "rows.jsonl.gz", json_lines(*ROWS)),
    "JSON list in xz": lambda folder: write_compressed(folder / "rows.json.xz", json.dumps(ROWS).encode()),
    "CSV in Zstandard": lambda folder: write_compressed(
        folder / "rows.csv.zst", Path(write_csv(folder / "rows.csv", *ROWS)).read_bytes()
    ),
    "TSV in bzip2": lambda folder: write_compressed(
        folder / "rows.tsv.bz2", Path(write_tsv(folder / "rows.tsv", *ROWS)).read_bytes()
    ),
    "address": lambda folder: in_memory(f"{folder}/rows.jsonl", json_lines(*ROWS)),
    "address of a local file": lambda folder: f"file://{write_lines(folder / 'rows.jsonl', *ROWS)}",
    "address of a compressed file": lambda folder: in_memory(
        f"{folder}/rows.jsonl.zst", COMPRESS[".zst"](json_lines(*ROWS))
    ),
    "address of Parquet": parquet_in_memory,
    "pattern behind an address": pattern_in_memory,
    "saved": saved,
    "saved splits": saved_splits,
    "saved split": lambda folder: saved_splits(folder) + "::test[1:]",
    "saved behind an address": saved_in_memory,
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


class HeldBackError(Exception):
    """Cannot be pickled and read back, as it needs two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raise_held_back(row: dict[str, object]) -> dict[str, object]:
    raise HeldBackError("not ", "today")
