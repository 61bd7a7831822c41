"""From files to token ids: rows are read through `datasets`, checked, rendered, tokenised once and cached on disk."""

import csv
import glob
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets, load_dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lightning_sft import tokenization
from lightning_sft.tokenization import encode_examples, num_response_labels

Row = Mapping[str, Any]
TooLong = Literal["error", "drop", "truncate"]
Data = str | Sequence[str] | Dataset | Sequence[Row]

_BATCH_ROWS = 1000
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
            ValueError: If a column is missing or its value is not a string; the message names the column.
        """
        row = self._transformed(row)
        output = _text(row, self.output_field, "output_field")
        return {"prompt": self._prompt(row), "output": output, "ground_truth": self._ground_truth(row) or output}

    def render_prompt(self, row: Row) -> dict[str, str | None]:
        """The row's `prompt` and `ground_truth` (None if it has none); an output is not needed.

        Raises:
            ValueError: As `render`.
        """
        row = self._transformed(row)
        return {"prompt": self._prompt(row), "ground_truth": self._ground_truth(row)}

    def _transformed(self, row: Row) -> Row:
        return row if self.row_transform is None else self.row_transform(dict(row))

    def _prompt(self, row: Row) -> str:
        if self.prompt_template is None:
            return _text(row, self.prompt_field, "prompt_field")
        values = {name: _text(row, name, "prompt_template") for name in _template_fields(self.prompt_template)}
        return self.prompt_template.format(**values)

    def _ground_truth(self, row: Row) -> str | None:
        by_default = self.ground_truth_field == RowFormat.ground_truth_field
        if by_default and row.get(self.ground_truth_field) is None:
            return None
        return _text(row, self.ground_truth_field, "ground_truth_field")


def _read_template(template: str) -> str:
    if "{" not in template:
        path = Path(template)
        if not path.is_file():
            raise FileNotFoundError(
                f"`prompt_template` is {template!r}, which has no {{column}} in it and is no file either. "
                "Give a text such as 'Question: {question}', or the path of a file with such a text."
            )
        template = path.read_text(encoding="utf-8").removesuffix("\n")
    try:
        fields = _template_fields(template)
    except ValueError as error:
        raise ValueError(f"`prompt_template` has unbalanced braces ({error}). Write literal braces twice.") from None
    for field in fields:
        if not field.isidentifier():
            raise ValueError(
                f"`prompt_template` has {{{field}}}, but expects plain column names such as {{question}}. "
                "Write literal braces twice."
            )
    return template


def _template_fields(template: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]


def _text(row: Row, field: str, argument: str) -> str:
    value = row.get(field)
    if field not in row or value is None:
        raise ValueError(f"no value for `{field}` (`{argument}`). The row has {sorted(row)}.")
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
    json_unit: Literal["line", "row"] | None = None  # each row is {"text": JSON}, to be called line or row N

    def decode(self, batch: dict[str, list[Any]], indices: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a batch, each with the words that locate it."""
        for offset, index in enumerate(indices):
            if self.json_unit is None:
                yield f"row {index + 1} of {self.name}", {key: values[offset] for key, values in batch.items()}
                continue
            where, line = f"{self.json_unit} {index + 1} of {self.name}", batch["text"][offset]
            if not line.strip():
                continue  # a blank line
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not valid JSON ({error}): {_shorten(line)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {_shorten(row)}.")
            yield where, row


def open_sources(data: Data, argument: str) -> list[Source]:
    """Find the rows behind a data argument.

    Args:
        data: A JSONL, JSON, CSV or Parquet file, a glob pattern, a hub data set's name (`name`, `name:config` or
            `name:config:split`; the split is `train` unless given), the folder of such a data set, a list of these,
            a `datasets.Dataset`, or a list of dictionaries.
        argument: What messages call the argument, such as `train_data`.

    Raises:
        FileNotFoundError: If a file is missing or a pattern matches none.
        ValueError: If a file is empty or cannot be read.
    """
    if isinstance(data, Dataset):
        return [Source(f"`{argument}`", data)]
    items = [data] if isinstance(data, str | Path) else list(data)
    if not items:
        raise ValueError(f"`{argument}` is empty; expected a file, a data set or a list of rows.")
    if all(isinstance(item, str | Path) for item in items):
        return [source for item in items for source in _open_name(str(item), argument)]
    if all(isinstance(item, Mapping) for item in items):
        return [_json_source(f"`{argument}`", items)]
    kinds = sorted({type(item).__name__ for item in items})
    raise TypeError(f"`{argument}` holds {kinds}; expected file names, or dictionaries, one for each row.")


def _open_name(name: str, argument: str) -> list[Source]:
    if name.endswith(_SUFFIXES) or glob.has_magic(name):
        paths = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        missing = [path for path in paths if not Path(path).is_file()]
        if missing or not paths:
            raise FileNotFoundError(f"`{argument}` is {name!r}, but there is no such file.")
        return [_open_file(path, argument) for path in paths]
    if Path(name).is_file():
        raise ValueError(f"`{argument}` is {name!r}; expected a file ending in {', '.join(_SUFFIXES)}.")
    path, *options = name.split(":")
    config, split = [*options, None, None][:2]
    try:
        return [Source(name, load_dataset(path, config or None, split=split or "train"))]
    except Exception as error:
        raise ValueError(
            f"`{argument}` is {name!r}: neither a file ({', '.join(_SUFFIXES)}) nor a data set that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def _open_file(path: str, argument: str) -> Source:
    if not Path(path).stat().st_size:
        raise ValueError(f"`{argument}`: {path} is empty; expected at least one row.")
    try:
        if path.endswith(".csv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                header = next(csv.reader(file))
            # Without types pandas would guess them and turn '007' into 7 and 'NA' into nothing.
            columns = Features({column: Value("string") for column in header})
            options = {"features": columns, "keep_default_na": False, "encoding": "utf-8-sig"}
            return Source(path, load_dataset("csv", data_files=[path], split="train", **options))
        if path.endswith(".parquet"):
            return Source(path, load_dataset("parquet", data_files=[path], split="train"))
        if path.endswith(".json"):
            text = Path(path).read_text(encoding="utf-8-sig")
            if text.lstrip().startswith("["):
                return _json_source(path, json.loads(text))
        # The JSON loader of `datasets` guesses types and turns '2020-01-01' into a timestamp: read lines of text.
        lines = load_dataset("text", data_files=[path], split="train", encoding="utf-8-sig")
        return Source(path, lines, json_unit="line")
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            reason = f"{path} is not UTF-8 text ({cause.reason} in line {_undecodable_line(path)})"
            raise ValueError(f"`{argument}`: {reason}. Save it as UTF-8.") from None
        raise ValueError(f"`{argument}`: cannot read {path}: {type(cause).__name__}: {cause}") from error


def _json_source(name: str, rows: Sequence[object]) -> Source:
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number} of {name}: expected an object with columns, got {_shorten(row)}.")
        columns.setdefault("text", []).append(json.dumps(row, default=repr))
    return Source(name, Dataset.from_dict(columns), json_unit="row")


def _undecodable_line(path: str) -> int:
    number = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return number


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
    parts = []
    for source in sources:
        rows = source.rows
        workers = num_proc or min(8, 1 + len(rows) // 20_000)
        parts.append(
            rows.map(
                encode,
                batched=True,
                batch_size=_BATCH_ROWS,
                with_indices=True,
                fn_kwargs={"source": Source(source.name, rows.select([]), source.json_unit)},
                remove_columns=rows.column_names,
                features=_ENCODED_FEATURES,
                num_proc=workers if workers > 1 else None,
                new_fingerprint=Hasher.hash([rows._fingerprint, source.name, encode.fingerprint()]),
                desc=f"Tokenising {Path(source.name.strip('`')).name}",
            )
        )
    dataset = concatenate_datasets(parts)
    if not len(dataset):
        raise ValueError(f"{', '.join(source.name for source in sources)}: no rows.")
    fate = np.asarray(dataset.with_format("numpy")["fate"])
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
                raise ValueError(f"{where}: {error}") from None
            places.append(where)
        prompts, outputs = [text["prompt"] for text in texts], [text["output"] for text in texts]
        examples = encode_examples(prompts, outputs, self.tokenizer, self.append_eos)

        columns: dict[str, list[Any]] = {name: [] for name in _ENCODED_FEATURES}
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
            values = (*text.values(), ids, num_prompt_tokens, len(ids), num_labels, fate)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return columns

    def fingerprint(self) -> str:
        """Changes with the tokenizer's content, the options, and the code of this file and of `tokenization`."""
        code = [Path(file).read_bytes() for file in (__file__, tokenization.__file__)]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        settings = (type(self.tokenizer).__name__, self.tokenizer.eos_token_id, self.row_format)
        return Hasher.hash([code, tokenizer, settings, self.max_length, self.too_long, self.append_eos])
