"""Sources of rows: files, data sets by name, and what is in memory already."""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Json, Value, load_dataset
from datasets.fingerprint import Hasher

from lightning_sft.data.cache import cache_error, cache_folder, code_hash, is_of_cache
from lightning_sft.data.rows.files import FileKind, check_parquet, find_files, local_copy, unreadable
from lightning_sft.data.rows.named_sets import load_named
from lightning_sft.data.rows.readers import UnreadableRow, parse_json, read_file
from lightning_sft.data.rows.row_format import AnyRow, Row
from lightning_sft.errors import SettingsError, SettingsTypeError, one_line, shorten

Data: TypeAlias = str | Sequence[str] | Dataset | Sequence[Row]

# Columns and keys whose values a template writes as whole objects, whatever keys they have.
_WRITTEN = ("tools", "tool_calls", "functions", "function_call", "chat_template_kwargs")
_JSON_FEATURES = Features({"location": Value("string"), "json": Value("string"), "problem": Value("string")})


def full_location(location: str, only_source: str | None) -> str:
    """A row's location with its source, which is in it already if there are several sources."""
    return location if only_source is None else f"{location} of {only_source}"


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

    def decode(self, batch: dict[str, list[Any]], indices: Sequence[int]) -> Iterator[tuple[str, AnyRow]]:
        """The rows at these indices, of given columns, each with its location, such as `line 3 of train.jsonl`."""
        features = self.rows.features  # a copy, each time that it is asked for
        for offset, index in enumerate(indices):
            stored = {column: values[offset] for column, values in batch.items()}
            if self.is_json:
                problem = stored["problem"]
                row = parse_json(stored["json"]) if problem is None else UnreadableRow(problem)
                yield f"{stored['location']} of {self.name}", row
            else:
                yield f"row {index + 1} of {self.name}", own_keys(stored, features)


def open_sources(data: Data, argument: str) -> list[Source]:
    """Find the rows behind a data argument, as `SFTDataModule` takes `val_data`; messages call it `argument`."""
    if isinstance(data, Dataset):
        if data.format["type"] == "custom":  # which only whoever indexes the data set would see
            raise SettingsError(
                f"`{argument}` is a data set with a transform (`with_transform`), which would not be applied. Give it "
                "as `row_transform`, or apply it by `map`."
            )
        sources = [Source(f"`{argument}`", data.with_format(None))]
    elif isinstance(data, str | Path):
        sources = _open_name(str(data), argument)
    elif isinstance(data, Sequence) and all(isinstance(item, str | Path) for item in data):
        sources = [source for name in data for source in _open_name(str(name), argument)]
    elif isinstance(data, Sequence) and all(isinstance(item, Mapping) for item in data):
        rows = [_json_row(f"row {number}", dict(row)) for number, row in enumerate(data, 1)]
        sources = [Source(f"`{argument}`", Dataset.from_list(rows, _JSON_FEATURES), is_json=True)]
    else:
        is_streamed = isinstance(data, IterableDataset)
        way_out = " To stream its rows, give its files or its name, and set `streaming` to true." if is_streamed else ""
        raise SettingsTypeError(
            f"`{argument}` is {shorten(data)} of type {type(data).__name__}; expected a file, a data set's name, "
            f"a list of these, a `datasets.Dataset`, or a list of dictionaries.{way_out}"
        )
    if not sources or not all(len(source.rows) for source in sources):
        raise SettingsError(f"`{argument}` has no rows; expected at least one.")
    return sources


def _open_name(name: str, argument: str) -> list[Source]:
    paths = find_files(name, argument)
    if paths:
        return [_open_file(path, argument) for path in paths]
    return [Source(name, load_named(name, argument))]


def _open_file(path: str, argument: str) -> Source:
    folder = cache_folder()
    try:
        # Left alone, `datasets` knows a changed file by its modification time only, which copying can preserve.
        local, kind = local_copy(path), FileKind.of(path)
        with open(local, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        key = Hasher.hash([content, kind.suffix, kind.compression, code_hash()])
        if kind.suffix == ".parquet":
            check_parquet(local)
            options = {"split": "train", "cache_dir": str(folder / key)}
            rows = load_dataset("parquet", data_files=[glob.escape(local)], **options)
            rows._fingerprint = key  # as `fingerprint` does here:
        else:
            arguments = {"path": local, "kind": kind}
            rows = Dataset.from_generator(_json_rows, _JSON_FEATURES, gen_kwargs=arguments, fingerprint=key)
        return Source(path, rows, is_json=kind.suffix != ".parquet")
    except Exception as error:
        cause = error.__cause__ or error
        if is_of_cache(cause):
            raise cache_error(cause) from error
        raise unreadable(argument, path, error) from error


def _json_rows(path: str, kind: FileKind) -> Iterator[dict[str, str | None]]:
    for location, row in read_file(path, kind=kind):
        yield _json_row(location, row)


def _json_row(location: str, row: dict[str, Any] | UnreadableRow) -> dict[str, str | None]:
    problem = row.problem if isinstance(row, UnreadableRow) else None
    text = None
    if problem is None:
        try:
            text = json.dumps(row, default=_as_json)
        except (TypeError, ValueError, RecursionError) as error:  # a key that is no text, a cycle, a deep nest
            problem = f"cannot be written as JSON: {one_line(error)}."
    return {"location": location, "json": text, "problem": problem}


def _as_json(value: Any) -> Any:
    """What JSON has for a value of another type: lists and numbers for arrays, tensors and what they hold.

    Anything else must not turn into text, which would pass for a prompt or an output.
    """
    return value.tolist() if hasattr(value, "tolist") else {type(value).__name__: repr(value)}


def own_keys(row: Row, features: Features | None) -> Row:
    """A row of Arrow data without the keys that belong to other rows.

    In Arrow the objects of a column have the keys of all rows, with None where a row has no such key itself. A chat
    template would write these, for example as arguments of a tool call. So they are removed from what a template
    writes as whole objects. A column that `datasets` keeps as JSON stays as it is: there, None is the row's own value.
    """
    return {column: _own_keys(value, (features or {}).get(column), column in _WRITTEN) for column, value in row.items()}


def _own_keys(value: object, feature: object, is_written: bool) -> object:
    if isinstance(feature, Json):
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
