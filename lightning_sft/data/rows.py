"""Where rows come from: files, hub data sets and lists; each checked, and rendered as prompt and output."""

import csv
import glob
import hashlib
import json
import os
import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast, get_args

import datasets
from datasets import Dataset, Features, Value, load_dataset
from datasets.fingerprint import Hasher

from lightning_sft.checks import check_type
from lightning_sft.data.chat import Conversation, TrainOnTurns, read_conversation
from lightning_sft.errors import MissingFileError, SettingsError, SettingsTypeError, one_line, shorten

Row = Mapping[str, Any]
Data: TypeAlias = str | Sequence[str] | Dataset | Sequence[Row]

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a row are its prompt, output and ground truth, and how the prompt is written.

    Args:
        prompt_field: Column with the text before; unused with a template.
        output_field: Column with the text to learn.
        ground_truth_field: Column with the reference answer; a row without the default column uses its output.
        prompt_template: Text with `{column}` in it, or the path of a file that holds such a text (its last line
            break is dropped). Literal braces are doubled.
        row_transform: Called with each row first; returns the row to use instead.
        train_on_turns: Of a conversation: whether all of the assistant's turns are learnt or the last one.
        chat_template_kwargs: More that the chat template can use; a row's own column of this name comes first.

    A row is a conversation if it has the column `messages` or `conversations` while neither `prompt_field` nor
    `prompt_template` is given, or if its prompt or output is a list of messages.

    Raises:
        FileNotFoundError: If the template has no `{column}` and is no file either.
        TypeError: If an argument is of another type.
        ValueError: If the template's braces are not of this form, or its file is not UTF-8 text.
    """

    prompt_field: str = "prompt"
    output_field: str = "output"
    ground_truth_field: str = "ground_truth"
    prompt_template: str | None = None
    row_transform: Callable[[dict[str, Any]], Row] | None = None
    train_on_turns: TrainOnTurns = "all"
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_field", "output_field", "ground_truth_field"):
            check_type(name, getattr(self, name), str, "the name of a column")
        if self.row_transform is not None and not callable(self.row_transform):
            raise SettingsTypeError(f"`row_transform` is {shorten(self.row_transform)}, expected a function.")
        if self.prompt_template is not None:
            check_type("prompt_template", self.prompt_template, str, "a text or the path of a file, as a string")
            object.__setattr__(self, "prompt_template", _read_template(self.prompt_template))
        if self.train_on_turns not in get_args(TrainOnTurns):
            choices = ", ".join(get_args(TrainOnTurns))
            raise SettingsError(f"`train_on_turns` is {self.train_on_turns!r}, expected one of {choices}.")
        if self.chat_template_kwargs is not None:
            check_type("chat_template_kwargs", self.chat_template_kwargs, Mapping, "values by their names")

    def render(self, row: Row) -> dict[str, Any]:
        """The row's `prompt`, `output` and `ground_truth`; or its `conversation`, and `ground_truth` or None.

        Raises:
            ValueError: If a column is missing or its value is not a string, or `row_transform` fails.
        """
        row = self._transformed(row)
        conversation = self._conversation(row)
        if conversation is not None:
            return {"conversation": conversation, "ground_truth": self._ground_truth(row)}
        prompt, output = self._prompt(row), _text(row, self.output_field, "output_field")
        ground_truth = self._ground_truth(row)
        return {"prompt": prompt, "output": output, "ground_truth": output if ground_truth is None else ground_truth}

    def render_prompt(self, row: Row) -> dict[str, Any]:
        """The row's `prompt` or `conversation`, and `ground_truth` (None if it has none); an output is not needed.

        Raises:
            ValueError: As `render`.
        """
        row = self._transformed(row)
        conversation = self._conversation(row)
        prompt = {"prompt": self._prompt(row)} if conversation is None else {"conversation": conversation}
        return {**prompt, "ground_truth": self._ground_truth(row)}

    def _transformed(self, row: Row) -> Row:
        if self.row_transform is None:
            return row
        try:
            row = self.row_transform(dict(row))
        except Exception as error:
            raise SettingsError(f"`row_transform` failed: {type(error).__name__}: {one_line(error)}") from error
        if not isinstance(row, Mapping):
            raise SettingsError(f"`row_transform` returned {shorten(row)}, expected a dictionary.")
        return row

    def _conversation(self, row: Row) -> Conversation | None:
        if self.prompt_template is not None:
            return None
        if self.prompt_field == RowFormat.prompt_field:
            for column in ("messages", "conversations"):
                if row.get(column) is not None:
                    return read_conversation(row, [column], self.chat_template_kwargs)
        columns = [self.prompt_field, self.output_field]
        if columns[1] == RowFormat.output_field and row.get(columns[1]) is None:
            columns[1] = "completion"
        first = [value[0] for value in map(row.get, columns) if isinstance(value, list) and value]
        if not any(isinstance(message, Mapping) for message in first):
            return None
        return read_conversation(row, columns, self.chat_template_kwargs)

    def _prompt(self, row: Row) -> str:
        if self.prompt_template is None:
            return _text(row, self.prompt_field, "prompt_field")
        fields = {field for _, field, _, _ in string.Formatter().parse(self.prompt_template) if field is not None}
        return self.prompt_template.format(**{field: _text(row, field, "prompt_template") for field in fields})

    def _ground_truth(self, row: Row) -> str | None:
        if self.ground_truth_field == RowFormat.ground_truth_field and row.get(self.ground_truth_field) is None:
            return None
        return _text(row, self.ground_truth_field, "ground_truth_field")


def _read_template(template: str) -> str:
    if "{" not in template:
        if not os.path.isfile(template):  # `Path.is_file` raises on a text too long for a file name
            raise MissingFileError(
                f"`prompt_template` is {template!r}, which has no {{column}} in it and is no file either. "
                "Give a text such as 'Question: {question}', or the path of a file with such a text."
            )
        try:
            template = Path(template).read_text(encoding="utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text ({error.reason}). Save the file as UTF-8."
            raise SettingsError(f"`prompt_template` is {template!r}, which is {problem}") from None
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise SettingsError(f"`prompt_template` has unbalanced braces ({error}). Write literal braces twice.") from None
    if not parts:
        raise SettingsError("`prompt_template` has no {column} in it, so all prompts would be the same.")
    for _, field, spec, conversion in parts:
        if not str(field).isidentifier() or spec or conversion:
            extras = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            found = shorten(f"{{{field}{extras}}}", 80).strip("'")  # a JSON example has line breaks
            raise SettingsError(
                f"`prompt_template` has {found}, but expects plain column names such as {{question}}. "
                "Write literal braces twice."
            )
    return template


def _text(row: Row, field: str, argument: str) -> str:
    value = row.get(field)
    if value is None:
        columns = shorten(sorted(map(str, row)), 200)
        raise SettingsError(f"no value for `{field}` (`{argument}`). The row has {columns}.")
    if not isinstance(value, str):
        raise SettingsError(
            f"`{field}` (`{argument}`) is {shorten(value)} of type {type(value).__name__}, expected a string."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        around = value[max(error.start - 20, 0) : error.start + 20]
        raise SettingsError(
            f"`{field}` (`{argument}`) holds a lone surrogate, which is not text: {around!a}."
        ) from None
    return value


@dataclass(frozen=True)
class Source:
    """Rows of one file, hub data set or in-memory collection, and how messages call it."""

    name: str
    rows: Dataset
    is_json: bool = False  # each row is {"place": "line 1", "json": "{...}"}: nothing guesses a type then

    def decode(self, batch: dict[str, list[Any]], indices: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a batch, each with the words that locate it."""
        for offset, index in enumerate(indices):
            row = {column: values[offset] for column, values in batch.items()}
            place = row["place"] if self.is_json else f"row {index + 1}"
            row = _parse(row["json"], place) if self.is_json else own_keys(row, self.rows.features)
            yield f"{place} of {self.name}", row


_JSON: Any = getattr(datasets, "Json", ())  # which older versions do not have


def own_keys(row: dict[str, Any], features: Features | None) -> dict[str, Any]:
    """A row of Arrow data without the keys that only other rows have in what its chat template may write.

    Arrow gives each object the keys of all others in its place, as None, which a template would write as arguments of
    a tool call. In a column that `datasets` keeps as JSON, None is the row's own word.
    """
    return _own_keys(row, features, written=False)


def _own_keys(value: Any, feature: Any, written: bool) -> Any:
    if isinstance(feature, _JSON):
        return value
    if isinstance(value, list):
        return [_own_keys(item, getattr(feature, "feature", None), written) for item in value]
    if not isinstance(value, dict):
        return value
    features = feature if isinstance(feature, dict) else {}
    return {
        key: _own_keys(item, features.get(key), written or key in ("tools", "tool_calls", "chat_template_kwargs"))
        for key, item in value.items()
        if item is not None or not written
    }


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
        try:
            rows = [_json_row(f"row {number}", dict(row)) for number, row in enumerate(data, 1)]
        except ValueError as error:
            raise SettingsError(f"`{argument}`: {error}") from None
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


def load_named(name: str, argument: str, streaming: bool = False) -> Any:
    """The `datasets.Dataset` of this name, or if it is streamed its `datasets.IterableDataset`.

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
        key = Hasher.hash([content, Path(path).suffix, Path(__file__).read_bytes()])
        if path.endswith(".parquet"):
            options = {"split": "train", "cache_dir": str(cache_folder() / key)}
            rows = load_dataset("parquet", data_files=[glob.escape(path)], **options)
            rows._fingerprint = key  # as `fingerprint` does here:
        else:
            rows = Dataset.from_generator(_read_rows, _JSON_FEATURES, gen_kwargs={"path": path}, fingerprint=key)
        return Source(path, rows, is_json=not path.endswith(".parquet"))
    except Exception as error:
        raise SettingsError(f"`{argument}`: cannot read {path}: {one_line(error.__cause__ or error)}") from error


def cache_folder() -> Path:
    """Where rows and their tokens are cached, inside the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE, "lightning_sft")


_JSON_FEATURES = Features({"place": Value("string"), "json": Value("string")})


def _json_row(place: str, row: object) -> dict[str, str]:
    # What JSON cannot hold must not turn into text, which would pass for a prompt or an output.
    try:
        text = json.dumps(row, default=lambda value: {type(value).__name__: repr(value)})
    except (TypeError, ValueError, RecursionError) as error:  # a key that is no text, a cycle, a deep nest
        raise SettingsError(f"{place}: cannot be written as JSON: {one_line(error)}.") from None
    return {"place": place, "json": text}


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise SettingsError(f"{place}: not valid JSON ({problem}): {shorten(text)}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a deep nest
        raise SettingsError(f"{place}: cannot be read as JSON: {one_line(error)}.") from None


def _read_rows(path: str) -> Iterator[dict[str, str]]:
    for place, row in read_file(path):
        yield _json_row(place, row)


def read_file(path: str, skip: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL, JSON or CSV file one by one, each with its place in it, such as `line 3`.

    Args:
        path: The file.
        skip: Leave out so many rows at the start, unparsed if each is a line of JSON.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has no rows, or a row is malformed; the message begins with its place.
    """
    rows: Iterator[tuple[str, object]]
    if path.endswith(".csv"):
        rows = islice(_read_csv(path), skip, None)
    elif path.endswith(".json") and _is_list(path):
        rows = islice(_read_json_list(path), skip, None)
    else:
        rows = _read_json_lines(path, skip)
    row = None
    for place, row in rows:
        if not isinstance(row, dict):
            raise SettingsError(f"{place}: expected a JSON object, got {shorten(row)}.")
        yield place, row
    if row is None and not skip:
        raise SettingsError("it has no rows.")


def _read_json_lines(path: str, skip: int) -> Iterator[tuple[str, object]]:
    lines = ((number, line) for number, line in enumerate(_text_lines(path), 1) if line.strip())
    for number, line in islice(lines, skip, None):
        place = f"line {number}"
        yield place, _parse(line, place)


def _is_list(path: str) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return next((char for char in iter(lambda: file.read(1), "") if not char.isspace()), "") == "["


_PIECE = 2**20  # characters of a file read at once
_SPACE = re.compile(r"[ \t\r\n]*")


def _read_json_list(path: str) -> Iterator[tuple[str, object]]:
    """Row by row: the whole list would take several times the file's size in memory."""
    decode, number = json.JSONDecoder().raw_decode, 0
    with suppress(ValueError), open(path, encoding="utf-8-sig", newline="") as file:
        while file.read(1) != "[":
            pass  # white space
        text, at = "", 0
        while True:
            try:
                row, end = decode(text, _after_space(text, at))
                end = _after_space(text, end)
                closed = {",": False, "]": True}.get(text[end])
            except (json.JSONDecodeError, IndexError):  # the row may go on
                piece = file.read(max(_PIECE, len(text) - at))
                if not piece:
                    break
                text, at = text[at:] + piece, 0
                continue
            if closed is None:
                break
            number, at = number + 1, end + 1
            yield f"row {number}", row
            if closed:
                if not (text[at:] + file.read()).strip(" \t\r\n"):
                    return
                break
    # No such list, or one without rows: read as a whole, for the words and the place of the error.
    rows = json.loads("".join(_text_lines(path)))
    yield from ((f"row {number}", row) for number, row in enumerate(rows[number:], number + 1))


def _after_space(text: str, at: int) -> int:
    return cast(re.Match[str], _SPACE.match(text, at)).end()


def _read_csv(path: str) -> Iterator[tuple[str, object]]:
    reader = csv.reader(_text_lines(path), strict=True)
    field_size_limit = csv.field_size_limit(sys.maxsize)  # unless raised, no field may pass 131,072 characters
    try:
        records = filter(None, reader)  # a blank line is an empty record
        header = next(records, [])
        twice = {column for column in header if column and header.count(column) > 1}
        if twice:
            raise SettingsError(f"its header has {shorten(min(twice))} more than once. Rename all but one.")
        for number, record in enumerate(records, 1):
            if len(record) != len(header):
                raise SettingsError(
                    f"row {number}: expected {len(header)} fields, as in the header, got {len(record)}."
                )
            yield f"row {number}", dict(zip(header, record, strict=True))
    except csv.Error as error:
        problem = str(error)
        if "new-line" in problem:  # a lone carriage return; what `csv` advises is about its own arguments
            problem = "a carriage return in a field without quotes. Quote the field, or end lines with a line feed"
        raise SettingsError(f"line {reader.line_num}: {problem}.") from None
    finally:
        csv.field_size_limit(field_size_limit)


def _text_lines(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SettingsError(
                    f"line {number}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
                ) from None
            yield text
