"""Sources of rows: files, data sets by name, and what is in memory already."""

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import datasets
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.fingerprint import Hasher

from lightning_sft.data.cache import cache_folder, code_hash
from lightning_sft.data.rows.readers import UnreadableRow, parse_json, read_file
from lightning_sft.data.rows.row_format import AnyRow, Row
from lightning_sft.errors import MissingFileError, SettingsError, SettingsTypeError, one_line, shorten

Data: TypeAlias = str | Sequence[str] | Dataset | Sequence[Row]

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_JSON_FEATURES = Features({"location": Value("string"), "json": Value("string"), "problem": Value("string")})


@dataclass(frozen=True)
class Source:
    """Rows of one file, data set or collection in memory, and how messages call it.

    Attributes:
        name: A path, the name of a data set, or the argument that the rows were passed as.
        rows: The rows; of a file of text and of a collection in memory as `is_json` says.
        is_json: Whether each row of `rows` is a location, such as `line 1`, and a text of JSON, or the problem of an
            `UnreadableRow`. Nothing guesses the type of a value then.
    """

    name: str
    rows: Dataset
    is_json: bool = False

    def decode(self, batch: dict[str, list[Any]], indices: list[int]) -> Iterator[tuple[str, AnyRow]]:
        """The rows of a batch, each with its location, such as `line 3 of train.jsonl`.

        Args:
            batch: Columns of `rows`.
            indices: Which rows these are.
        """
        features = self.rows.features  # a copy, each time that it is asked for
        for offset, index in enumerate(indices):
            stored = {column: values[offset] for column, values in batch.items()}
            location = stored["location"] if self.is_json else f"row {index + 1}"
            row: AnyRow
            if not self.is_json:
                row = own_keys(stored, features)
            elif stored["problem"] is None:
                row = parse_json(stored["json"])
            else:
                row = UnreadableRow(stored["problem"])
            yield f"{location} of {self.name}", row


def open_sources(data: Data, argument: str) -> list[Source]:
    """Find the rows behind a data argument.

    Args:
        data: A JSONL, JSON, CSV or Parquet file, a glob pattern, a hub data set's name (`name`, `name:config` or
            `name:config:split`; the split is `train` unless given; `name@revision:...` for a commit, branch or tag),
            the folder of such a data set, a list of these, a `datasets.Dataset`, or a list of dictionaries.
        argument: What messages call the argument, such as `train_data`.

    Raises:
        FileNotFoundError: If a file is missing or a pattern matches none.
        TypeError: If `data` is none of these.
        ValueError: If a source has no rows or cannot be read.
    """
    if isinstance(data, Dataset):
        sources = [Source(f"`{argument}`", data.with_format(None))]
    elif isinstance(data, str | Path):
        sources = _open_name(str(data), argument)
    elif isinstance(data, Sequence) and all(isinstance(item, str | Path) for item in data):
        sources = [source for name in data for source in _open_name(str(name), argument)]
    elif isinstance(data, Sequence) and all(isinstance(item, Mapping) for item in data):
        rows = [_json_row(f"row {number}", dict(row)) for number, row in enumerate(data, 1)]
        sources = [Source(f"`{argument}`", Dataset.from_list(rows, _JSON_FEATURES), is_json=True)]
    else:
        raise SettingsTypeError(
            f"`{argument}` is {shorten(data)} of type {type(data).__name__}; expected a file, a data set's name, "
            "a list of these, a `datasets.Dataset`, or a list of dictionaries."
        )
    if not sources or not all(len(source.rows) for source in sources):
        raise SettingsError(f"`{argument}` has no rows; expected at least one.")
    return sources


def _open_name(name: str, argument: str) -> list[Source]:
    paths = find_files(name, argument)
    if paths:
        return [_open_file(path, argument) for path in paths]
    return [Source(name, load_named(name, argument))]


def find_files(name: str, argument: str) -> list[str]:
    """The files that a name means; none if it is not one of a file or pattern.

    Raises:
        FileNotFoundError: If a file is missing or a pattern matches none.
        ValueError: If there is no name, or a file is of an unknown kind.
    """
    if not name.strip():
        raise SettingsError(f"`{argument}` is {name!r}; expected a file or the name of a data set.")
    path, *options = name.split(":", 2)
    if os.path.isfile(name):
        paths = [name]
    elif options and path.endswith(_SUFFIXES):
        raise SettingsError(f"`{argument}` is {name!r}, but a file has neither configuration nor split. Use {path!r}.")
    elif name.endswith(_SUFFIXES) or glob.has_magic(path):
        paths = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not paths:
            raise MissingFileError(f"`{argument}` is {name!r}, but there is no such file.")
    else:
        return []
    for path in paths:
        if not path.endswith(_SUFFIXES):
            raise SettingsError(f"`{argument}` is {path!r}; expected a file ending in {', '.join(_SUFFIXES)}.")
    return paths


@overload
def load_named(name: str, argument: str, streaming: Literal[False] = False) -> Dataset: ...
@overload
def load_named(name: str, argument: str, streaming: Literal[True]) -> IterableDataset: ...
def load_named(name: str, argument: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Load a data set by its name, as `open_sources` takes it.

    Args:
        name: Of the data set.
        argument: What messages call the argument that holds the name.
        streaming: Whether it is read while it is used, rather than now.

    Raises:
        ValueError: If it cannot be loaded.
    """
    path, *options = name.split(":", 2)
    config, split = [*options, None, None][:2]
    revision = None
    if "@" in path and not os.path.exists(path):
        path, _, revision = path.rpartition("@")
    try:
        return load_dataset(path, config or None, split=split or "train", revision=revision, streaming=streaming)
    except Exception as error:
        raise SettingsError(
            f"`{argument}` is {name!r}: neither a file ({', '.join(_SUFFIXES)}) nor a data set that can be loaded: "
            f"{type(error).__name__}: {one_line(error.__cause__ or error)}"
        ) from error


def _open_file(path: str, argument: str) -> Source:
    try:
        # Left alone, `datasets` knows a changed file by its modification time only, which copying can preserve.
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        key = Hasher.hash([content, Path(path).suffix, code_hash()])
        if path.endswith(".parquet"):
            options = {"split": "train", "cache_dir": str(cache_folder() / key)}
            rows = load_dataset("parquet", data_files=[glob.escape(path)], **options)
            rows._fingerprint = key  # as `fingerprint` does here:
        else:
            rows = Dataset.from_generator(_json_rows, _JSON_FEATURES, gen_kwargs={"path": path}, fingerprint=key)
        return Source(path, rows, is_json=not path.endswith(".parquet"))
    except Exception as error:
        raise SettingsError(f"`{argument}`: cannot read {path}: {one_line(error.__cause__ or error)}") from error


def _json_rows(path: str) -> Iterator[dict[str, str | None]]:
    for location, row in read_file(path):
        yield _json_row(location, row)


def _json_row(location: str, row: dict[str, Any] | UnreadableRow) -> dict[str, str | None]:
    problem = row.problem if isinstance(row, UnreadableRow) else None
    text = None
    if problem is None:
        try:
            # What JSON cannot hold must not turn into text, which would pass for a prompt or an output.
            text = json.dumps(row, default=lambda value: {type(value).__name__: repr(value)})
        except (TypeError, ValueError, RecursionError) as error:  # a key that is no text, a cycle, a deep nest
            problem = f"cannot be written as JSON: {one_line(error)}."
    return {"location": location, "json": text, "problem": problem}


def own_keys(row: Row, features: Features | None) -> Row:
    """A row of Arrow data without the keys that belong to other rows.

    In Arrow the objects of a column have the keys of all rows, with None where a row has no such key itself. A chat
    template would write these, for example as arguments of a tool call. So they are removed from what a template
    writes as whole objects. A column that `datasets` keeps as JSON stays as it is: there, None is the row's own value.

    Args:
        row: Values by column.
        features: The types of the columns, if they are known.
    """
    return {column: _own_keys(value, (features or {}).get(column), column in _WRITTEN) for column, value in row.items()}


# Columns and keys whose values a template writes as whole objects, whatever keys they have:
_WRITTEN = ("tools", "tool_calls", "functions", "function_call", "chat_template_kwargs")
_JSON_FEATURE: Any = getattr(datasets, "Json", ())  # which older versions do not have


def _own_keys(value: object, feature: object, is_written: bool) -> object:
    if isinstance(feature, _JSON_FEATURE):
        return value
    if isinstance(value, list):
        return [_own_keys(item, getattr(feature, "feature", None), is_written) for item in value]
    if not isinstance(value, dict):
        return value
    features = feature if isinstance(feature, dict) else {}
    return {
        key: _own_keys(item, features.get(key), is_written or key in _WRITTEN)
        for key, item in value.items()
        if item is not None or not is_written
    }
