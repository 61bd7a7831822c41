"""From rows to token ids: tokenised once, and cached on disk by the content of all that they depend on."""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_choice, check_integer, check_type
from lightning_sft.data import chat, example, rows, tokenization
from lightning_sft.data.chat import ChatTemplate
from lightning_sft.data.example import Example
from lightning_sft.data.rows import Row, RowFormat, Source, cache_folder
from lightning_sft.data.tokenization import encode_examples
from lightning_sft.errors import SettingsError, located, shorten

TooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True)
class Encoding:
    """How rows become token ids.

    Args:
        max_length: The most tokens of prompt and response together, EOS included; no limit if None.
        too_long: What happens to longer rows: an error, or they are dropped, or cut at the end (losing their EOS). A
            row whose prompt alone leaves no room for a response is dropped under `truncate` too.
        append_eos: Whether each response ends in EOS. Conversations end as the chat template has it.

    Raises:
        SettingsError: If an argument is of another type or out of range.
    """

    max_length: int | None = None
    too_long: TooLong = "error"
    append_eos: bool = True

    def __post_init__(self) -> None:
        check_integer("max_length", self.max_length, optional=True)
        if self.max_length is not None and self.max_length < 2:
            raise SettingsError(
                f"`max_length` is {self.max_length}, expected at least 2: a prompt token and a response token."
            )
        check_choice("too_long", self.too_long, TooLong)
        check_type("append_eos", self.append_eos, bool, "true or false")


@dataclass(frozen=True)
class EncodedRows:
    """Tokenised rows and what became of the over-long ones.

    `dataset` has the columns `prompt`, `output`, `ground_truth` (text), `is_chat`, `input_ids`, `num_prompt_tokens`,
    `excluded_spans` (`Example`), `num_tokens`, `num_response_tokens` (labels that count in the loss) and `location`
    (`line 3`, or of several sources `line 3 of b.jsonl`). Of a conversation, `prompt` is all up to the assistant's last
    turn that is learnt, `output` this turn and `ground_truth` what it says. `sizes` are the numbers of rows of each
    source in it.
    """

    dataset: Dataset
    num_dropped: int
    num_truncated: int
    sizes: list[int]


def encode_rows(
    sources: Sequence[Source],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding = Encoding(),
    num_proc: int | None = None,
) -> EncodedRows:
    """Tokenise all rows; results are cached on disk by the content of everything they depend on.

    Args:
        sources: From `open_sources`.
        row_format: Which columns are what.
        tokenizer: Any Hugging Face tokenizer.
        encoding: How rows become token ids.
        num_proc: Worker processes; one for each 20,000 rows, at most 8, if None.

    Raises:
        ValueError: If a row is malformed, has no response token, or is too long; the message names file and row.
    """
    encode = RowEncoder(row_format, tokenizer, encoding)
    key = encode.fingerprint()
    cache_folder().mkdir(parents=True, exist_ok=True)
    parts = []
    for source in sources:
        raw = source.rows
        workers = num_proc or min(8, 1 + len(raw) // 20_000)
        name = source.name if len(sources) > 1 else None  # alone, the same rows by another name are the same
        fingerprint = Hasher.hash([raw._fingerprint, source.is_json, key, name])
        try:
            encoded = raw.map(
                encode,
                batched=True,
                with_indices=True,
                fn_kwargs={"source": replace(source, rows=raw.select([])), "keep_name": name is not None},
                remove_columns=raw.column_names,
                features=_ENCODED_FEATURES,
                num_proc=workers if workers > 1 else None,
                new_fingerprint=fingerprint,
                # Named here, so that rows in memory, too, are encoded to disk and found by the other processes.
                cache_file_name=str(cache_folder() / f"{fingerprint}.arrow"),
                desc=f"Tokenising {Path(source.name.strip('`')).name}",
            )
        except SettingsError as error:  # raised here again, not deep in a pool of workers: it is our own message
            raise error.with_traceback(None) from error.__cause__
        parts.append(encoded)
    dataset = concatenate_datasets(parts)
    num_dropped = sum(len(source.rows) for source in sources) - len(dataset)
    num_truncated = int(read_numbers(dataset, "is_truncated").sum())
    return EncodedRows(dataset.remove_columns("is_truncated"), num_dropped, num_truncated, list(map(len, parts)))


def rows_in_memory(columns: dict[str, list[Any]]) -> Dataset:
    """What `RowEncoder.encode` gives, as `EncodedRows.dataset` holds it."""
    return Dataset.from_dict(columns, _ENCODED_FEATURES).remove_columns("is_truncated")


def render_prompts(sources: Sequence[Source], row_format: RowFormat, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The columns `prompt`, `ground_truth` and `is_chat` of rows that need no output.

    Raises:
        ValueError: If a row is malformed; the message names file and row.
    """
    template, prompts = ChatTemplate(tokenizer), []
    for source in sources:
        for start in range(0, len(source.rows), 1000):
            indices = range(start, min(start + 1000, len(source.rows)))
            for where, row in source.decode(source.rows[start : indices.stop], list(indices)):
                with located(where):
                    prompt = row_format.render_prompt(row)
                    conversation = prompt.pop("conversation", None)
                    if conversation is not None:
                        text, content = template.write_prompt(conversation)
                        ground_truth = content if prompt["ground_truth"] is None else prompt["ground_truth"]
                        prompt = {"prompt": text, "ground_truth": ground_truth}
                    prompts.append(prompt | {"is_chat": conversation is not None})
    return Dataset.from_list(prompts)


def content_hash(dataset: Dataset) -> str:
    """Of all token ids in order, and where prompts end: what a run's place in its data depends on."""
    hasher = hashlib.blake2b(digest_size=8)
    columns = dataset.select_columns(["input_ids", "num_prompt_tokens", "excluded_spans", "num_tokens"]).with_format(
        "arrow"
    )
    for table in columns.iter(batch_size=10_000):
        ids, spans = (table[name].combine_chunks().flatten() for name in ("input_ids", "excluded_spans"))
        for column in (ids, table["num_prompt_tokens"], spans, table["num_tokens"]):
            hasher.update(column.to_numpy())
    return hasher.hexdigest()


def read_numbers(dataset: Dataset, column: str) -> np.ndarray:
    """A whole column of numbers, `(num_rows,)`.

    Formatted as numpy, `datasets` would make a Python object of each number, and of rows that were selected even a
    table of each.
    """
    numbers = dataset.data.column(column).to_numpy()
    return numbers if dataset._indices is None else numbers[dataset._indices.column(0).to_numpy()]


_ENCODED_FEATURES = Features(
    {
        "prompt": Value("string"),
        "output": Value("string"),
        "ground_truth": Value("string"),
        "is_chat": Value("bool"),
        "input_ids": [Value("int32")],
        "num_prompt_tokens": Value("int32"),
        "excluded_spans": [Value("int32")],
        "num_tokens": Value("int32"),
        "num_response_tokens": Value("int32"),
        "location": Value("string"),
        "is_truncated": Value("bool"),
    }
)


@dataclass
class RowEncoder:
    """Turns rows into token ids; called by `datasets` with batches of rows."""

    row_format: RowFormat
    tokenizer: PreTrainedTokenizerBase
    encoding: Encoding

    def __call__(
        self, batch: dict[str, list[Any]], indices: list[int], source: Source, keep_name: bool
    ) -> dict[str, list[Any]]:
        columns = self.encode(source.decode(batch, indices))
        if not keep_name:
            columns["location"] = [where.removesuffix(f" of {source.name}") for where in columns["location"]]
        return columns

    def encode(self, rows: Iterable[tuple[str, Row]]) -> dict[str, list[Any]]:
        """The columns of `EncodedRows.dataset`, and `is_truncated`, of those rows that are not dropped.

        Args:
            rows: Each with the words that locate it.

        Raises:
            ValueError: As `encode_rows`.
        """
        places: list[str] = []
        texts: list[dict[str, Any]] = []
        template = ChatTemplate(self.tokenizer, self.row_format.train_on_turns)
        for where, row in rows:
            with located(where):
                text = self.row_format.render(row)
                if "conversation" in text:
                    text["chat"] = written = template.write(text.pop("conversation"))
                    text |= {"prompt": written.prompt, "output": written.output}
                    text["ground_truth"] = written.content if text["ground_truth"] is None else text["ground_truth"]
            texts.append(text)
            places.append(where)
        plain = [text for text in texts if "chat" not in text]
        prompts, outputs = [text["prompt"] for text in plain], [text["output"] for text in plain]
        examples = iter(encode_examples(prompts, outputs, self.tokenizer, self.encoding.append_eos))
        chats = template.encode([text["chat"] for text in texts if "chat" in text])

        encoded = []
        for where, text in zip(places, texts, strict=True):
            with located(where):
                example = next(chats if "chat" in text else examples)
            ids, num_prompt_tokens = example.input_ids, example.num_prompt_tokens
            if not example.num_response_labels:
                raise SettingsError(
                    f"{where}: no response token to learn from; `{self.row_format.output_field}` is "
                    f"{shorten(text['output'])}. Remove the row, or set `append_eos=True`."
                )
            over = self.encoding.max_length is not None and len(ids) > self.encoding.max_length
            if over and self.encoding.too_long == "error":
                raise SettingsError(
                    f"{where}: {len(ids)} tokens ({num_prompt_tokens} of the prompt) exceed `max_length` = "
                    f'{self.encoding.max_length}. Raise `max_length`, or set `too_long` to "drop" or "truncate".'
                )
            ids = ids[: self.encoding.max_length]
            spans = [min(bound, len(ids)) for bound in example.excluded_spans]
            num_labels = Example(ids, num_prompt_tokens, spans).num_response_labels
            if not (over and (self.encoding.too_long == "drop" or not num_labels)):
                words = (text["prompt"], text["output"], text["ground_truth"], "chat" in text)
                encoded.append((*words, ids, num_prompt_tokens, spans, len(ids), num_labels, where, over))
        columns = map(list, zip(*encoded, strict=True)) if encoded else ([] for _ in _ENCODED_FEATURES)
        return dict(zip(_ENCODED_FEATURES, columns, strict=True))

    def fingerprint(self) -> str:
        """Changes with the tokenizer's content, the options, and the code that reads and encodes."""
        tokenizer, transform = self.tokenizer, self.row_format.row_transform
        if getattr(tokenizer, "backend_tokenizer", None) is not None:  # its calls leave their settings behind
            content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        else:
            content = [sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
        special = (type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.split_special_tokens)
        template = (tokenizer.chat_template, tokenizer.special_tokens_map)
        # A function of a module is hashed by its name alone, so the module's code is added.
        module = sys.modules.get(getattr(getattr(transform, "func", transform), "__module__", ""))
        files = [
            *(m.__file__ for m in (chat, example, rows, tokenization)),
            __file__,
            getattr(module, "__file__", None),
        ]
        code = [Path(file).read_bytes() for file in files if file]
        options = (self.row_format, self.encoding)
        return Hasher.hash([code, content, special, template, options])
