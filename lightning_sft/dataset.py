"""From files to token ids: rows are read, checked, rendered, tokenised once and cached on disk by their content."""

import csv
import glob
import hashlib
import json
import os
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lightning_sft import tokenization
from lightning_sft.tokenization import encode_examples, num_response_labels

Row = Mapping[str, Any]
TooLong = Literal["error", "drop", "truncate"]
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

    Raises:
        FileNotFoundError: If the template has no `{column}` and is no file either.
        ValueError: If the template's braces are not of this form.
    """

    prompt_field: str = "prompt"
    output_field: str = "output"
    ground_truth_field: str = "ground_truth"
    prompt_template: str | None = None
    row_transform: Callable[[dict[str, Any]], Row] | None = None

    def __post_init__(self) -> None:
        if self.prompt_template is not None:
            object.__setattr__(self, "prompt_template", _read_template(self.prompt_template))

    def render(self, row: Row) -> dict[str, str]:
        """The row's `prompt`, `output` and `ground_truth`.

        Raises:
            ValueError: If a column is missing or its value is not a string, or `row_transform` fails.
        """
        row = self._transformed(row)
        prompt, output = self._prompt(row), _text(row, self.output_field, "output_field")
        ground_truth = self._ground_truth(row)
        return {"prompt": prompt, "output": output, "ground_truth": output if ground_truth is None else ground_truth}

    def render_prompt(self, row: Row) -> dict[str, str | None]:
        """The row's `prompt` and `ground_truth` (None if it has none); an output is not needed.

        Raises:
            ValueError: As `render`.
        """
        row = self._transformed(row)
        return {"prompt": self._prompt(row), "ground_truth": self._ground_truth(row)}

    def _transformed(self, row: Row) -> Row:
        if self.row_transform is None:
            return row
        try:
            row = self.row_transform(dict(row))
        except Exception as error:
            raise ValueError(f"`row_transform` failed: {type(error).__name__}: {error}") from error
        if not isinstance(row, Mapping):
            raise ValueError(f"`row_transform` returned {_shorten(row)}, expected a dictionary.")
        return row

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
            raise FileNotFoundError(
                f"`prompt_template` is {template!r}, which has no {{column}} in it and is no file either. "
                "Give a text such as 'Question: {question}', or the path of a file with such a text."
            )
        template = Path(template).read_text(encoding="utf-8-sig").removesuffix("\n")
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"`prompt_template` has unbalanced braces ({error}). Write literal braces twice.") from None
    if not parts:
        raise ValueError("`prompt_template` has no {column} in it, so all prompts would be the same.")
    for _, field, spec, conversion in parts:
        if not str(field).isidentifier() or spec or conversion:
            extras = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"`prompt_template` has {{{field}{extras}}}, but expects plain column names such as {{question}}. "
                "Write literal braces twice."
            )
    return template


def _text(row: Row, field: str, argument: str) -> str:
    value = row.get(field)
    if value is None:
        raise ValueError(f"no value for `{field}` (`{argument}`). The row has {sorted(map(str, row))}.")
    if not isinstance(value, str):
        raise ValueError(
            f"`{field}` (`{argument}`) is {_shorten(value)} of type {type(value).__name__}, expected a string."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{field}` (`{argument}`) holds a lone surrogate, which is not text: {value!a}.") from None
    return value


def _shorten(value: object, limit: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


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
            yield f"{place} of {self.name}", json.loads(row["json"]) if self.is_json else row


def open_sources(data: Data, argument: str) -> list[Source]:
    """Find the rows behind a data argument.

    Args:
        data: A JSONL, JSON, CSV or Parquet file, a glob pattern, a hub data set's name (`name`, `name:config` or
            `name:config:split`; the split is `train` unless given), the folder of such a data set, a list of these,
            a `datasets.Dataset`, or a list of dictionaries.
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
        raise TypeError(
            f"`{argument}` is {_shorten(data)} of type {type(data).__name__}; expected a file, a data set's name, "
            "a list of these, a `datasets.Dataset`, or a list of dictionaries."
        )
    if not sources or not all(len(source.rows) for source in sources):
        raise ValueError(f"`{argument}` has no rows; expected at least one.")
    return sources


def _open_name(name: str, argument: str) -> list[Source]:
    if os.path.isfile(name):
        return [_open_file(name, argument)]
    path, *options = name.split(":", 2)
    if name.endswith(_SUFFIXES) or glob.has_magic(path):
        paths = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not paths:
            raise FileNotFoundError(f"`{argument}` is {name!r}, but there is no such file.")
        return [_open_file(path, argument) for path in paths]
    config, split = [*options, None, None][:2]
    try:
        return [Source(name, load_dataset(path, config or None, split=split or "train"))]
    except Exception as error:
        raise ValueError(
            f"`{argument}` is {name!r}: neither a file ({', '.join(_SUFFIXES)}) nor a data set that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _open_file(path: str, argument: str) -> Source:
    if not path.endswith(_SUFFIXES):
        raise ValueError(f"`{argument}` is {path!r}; expected a file ending in {', '.join(_SUFFIXES)}.")
    try:
        # Left alone, `datasets` knows a changed file by its modification time only, which copying can preserve.
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        key = Hasher.hash([content, Path(path).suffix, Path(__file__).read_bytes()])
        if path.endswith(".parquet"):
            options = {"split": "train", "cache_dir": str(_cache_folder() / key)}
            rows = load_dataset("parquet", data_files=[glob.escape(path)], **options)
            rows._fingerprint = key  # as `fingerprint` does here:
        else:
            rows = Dataset.from_generator(_read_rows, _JSON_FEATURES, gen_kwargs={"path": path}, fingerprint=key)
        return Source(path, rows, is_json=not path.endswith(".parquet"))
    except Exception as error:
        raise ValueError(f"`{argument}`: cannot read {path}: {error.__cause__ or error}") from error


def _cache_folder() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, "lightning_sft")


_JSON_FEATURES = Features({"place": Value("string"), "json": Value("string")})


def _json_row(place: str, row: object) -> dict[str, str]:
    # What JSON cannot hold must not turn into text, which would pass for a prompt or an output.
    return {"place": place, "json": json.dumps(row, default=lambda value: {type(value).__name__: repr(value)})}


def _read_rows(path: str) -> Iterator[dict[str, str]]:
    read = {".csv": _read_csv, ".json": _read_json}.get(Path(path).suffix, _read_json_lines)
    row = None
    for place, row in read(path):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected a JSON object, got {_shorten(row)}.")
        yield _json_row(place, row)
    if row is None:
        raise ValueError("it has no rows.")


def _read_json_lines(path: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_text_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at column {error.colno}"
                raise ValueError(f"line {number}: not valid JSON ({problem}): {_shorten(line)}") from None
            yield f"line {number}", row


def _read_json(path: str) -> Iterator[tuple[str, object]]:
    start = next((line for line in _text_lines(path) if line.strip()), "").lstrip()
    if not start.startswith("["):
        return _read_json_lines(path)
    rows = json.loads("".join(_text_lines(path)))
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: str) -> Iterator[tuple[str, object]]:
    reader = csv.reader(_text_lines(path), strict=True)
    field_size_limit = csv.field_size_limit(sys.maxsize)  # unless raised, no field may pass 131,072 characters
    try:
        records = filter(None, reader)  # a blank line is an empty record
        header = next(records, [])
        for number, record in enumerate(records, 1):
            if len(record) != len(header):
                raise ValueError(f"row {number}: expected {len(header)} fields, as in the header, got {len(record)}.")
            yield f"row {number}", dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}.") from None
    finally:
        csv.field_size_limit(field_size_limit)


def _text_lines(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from None
            yield text


@dataclass(frozen=True)
class EncodedRows:
    """Tokenised rows and what became of the over-long ones.

    `dataset` has the columns `prompt`, `output`, `ground_truth` (text), `input_ids`, `num_prompt_tokens`,
    `num_tokens` and `num_response_tokens` (labels that count in the loss).
    """

    dataset: Dataset
    num_dropped: int
    num_truncated: int


def encode_rows(
    sources: Sequence[Source],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    too_long: TooLong = "error",
    append_eos: bool = True,
    num_proc: int | None = None,
) -> EncodedRows:
    """Tokenise all rows; results are cached on disk by the content of everything they depend on.

    Args:
        sources: From `open_sources`.
        row_format: Which columns are what.
        tokenizer: Any Hugging Face tokenizer.
        max_length: Most tokens of prompt and response together, EOS included; no limit if None.
        too_long: What happens to longer rows: an error, or they are dropped, or cut at the end (losing their EOS).
            A row whose prompt alone leaves no room for a response is dropped under `"truncate"` too.
        append_eos: Whether each response ends in EOS.
        num_proc: Worker processes; one for each 20,000 rows, at most 8, if None.

    Raises:
        ValueError: If a row is malformed, has no response token, or is too long; the message names file and row.
    """
    encode = _Encode(row_format, tokenizer, max_length, too_long, append_eos)
    key = encode.fingerprint()
    _cache_folder().mkdir(parents=True, exist_ok=True)
    parts = []
    for source in sources:
        rows = source.rows
        workers = num_proc or min(8, 1 + len(rows) // 20_000)
        fingerprint = Hasher.hash([rows._fingerprint, source.is_json, key])
        try:
            encoded = rows.map(
                encode,
                batched=True,
                with_indices=True,
                fn_kwargs={"source": replace(source, rows=rows.select([]))},
                remove_columns=rows.column_names,
                features=_ENCODED_FEATURES,
                num_proc=workers if workers > 1 else None,
                new_fingerprint=fingerprint,
                # Named here, so that rows in memory, too, are encoded to disk and found by the other processes.
                cache_file_name=str(_cache_folder() / f"{fingerprint}.arrow"),
                desc=f"Tokenising {Path(source.name.strip('`')).name}",
            )
        except ValueError as error:  # raised here again, not deep in a pool of workers: it is our own message
            raise error.with_traceback(None) from error.__cause__
        parts.append(encoded)
    dataset = concatenate_datasets(parts)
    fate = dataset.with_format("numpy")["fate"][:]
    dataset = dataset.remove_columns("fate")
    if (fate == _DROPPED).any():
        dataset = dataset.select(np.flatnonzero(fate != _DROPPED))
    return EncodedRows(dataset, int((fate == _DROPPED).sum()), int((fate == _TRUNCATED).sum()))


_KEPT, _TRUNCATED, _DROPPED = range(3)

_ENCODED_FEATURES = Features(
    {
        "prompt": Value("string"),
        "output": Value("string"),
        "ground_truth": Value("string"),
        "input_ids": [Value("int32")],
        "num_prompt_tokens": Value("int32"),
        "num_tokens": Value("int32"),
        "num_response_tokens": Value("int32"),
        "fate": Value("int8"),
    }
)


@dataclass
class _Encode:
    """The function mapped over batches of rows."""

    row_format: RowFormat
    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    too_long: TooLong
    append_eos: bool

    def __call__(self, batch: dict[str, list[Any]], indices: list[int], source: Source) -> dict[str, list[Any]]:
        places, texts = [], []
        for where, row in source.decode(batch, indices):
            try:
                texts.append(self.row_format.render(row))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error.__cause__
            places.append(where)
        prompts, outputs = [text["prompt"] for text in texts], [text["output"] for text in texts]
        examples = encode_examples(prompts, outputs, self.tokenizer, self.append_eos)

        encoded = []
        for where, text, example in zip(places, texts, examples, strict=True):
            ids, num_prompt_tokens = example["input_ids"], example["num_prompt_tokens"]
            if not num_response_labels(len(ids), num_prompt_tokens):
                raise ValueError(
                    f"{where}: no response token to learn from; `{self.row_format.output_field}` is "
                    f"{_shorten(text['output'])}. Remove the row, or set `append_eos=True`."
                )
            over = self.max_length is not None and len(ids) > self.max_length
            if over and self.too_long == "error":
                raise ValueError(
                    f"{where}: {len(ids)} tokens ({num_prompt_tokens} of the prompt) exceed `max_length` = "
                    f'{self.max_length}. Raise `max_length`, or set `too_long` to "drop" or "truncate".'
                )
            if over:
                ids = ids[: self.max_length]
            num_labels = num_response_labels(len(ids), num_prompt_tokens)
            fate = _KEPT if not over else _DROPPED if self.too_long == "drop" or not num_labels else _TRUNCATED
            encoded.append((*text.values(), ids, num_prompt_tokens, len(ids), num_labels, fate))
        return dict(zip(_ENCODED_FEATURES, map(list, zip(*encoded, strict=True)), strict=True))

    def fingerprint(self) -> str:
        """Changes with the tokenizer's content, the options, and the code of this file and of `tokenization`."""
        tokenizer, transform = self.tokenizer, self.row_format.row_transform
        if getattr(tokenizer, "backend_tokenizer", None) is not None:  # its calls leave their settings behind
            content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        else:
            content = [sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
        special = (type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.split_special_tokens)
        # A function of a module is hashed by its name alone, so the module's code is added.
        module = sys.modules.get(getattr(getattr(transform, "func", transform), "__module__", ""))
        files = [__file__, tokenization.__file__, getattr(module, "__file__", None)]
        code = [Path(file).read_bytes() for file in files if file]
        return Hasher.hash([code, content, special, self.row_format, self.max_length, self.too_long, self.append_eos])
