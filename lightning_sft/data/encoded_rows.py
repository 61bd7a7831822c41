"""Encoded rows: tokenised once, and cached on disk by the content of all that they depend on."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from lightning_sft.data.cache import cache_error, cache_folder
from lightning_sft.data.chat.notices import Notice
from lightning_sft.data.encoded_example import ENCODED_FEATURES, EncodedExample, to_table
from lightning_sft.data.encoding import RowEncoder
from lightning_sft.data.forking import collect_before_forking
from lightning_sft.data.rows.bad_rows import BadRow, BadRowCounts
from lightning_sft.data.rows.sources import Source
from lightning_sft.errors import SettingsError

_ROWS_READ_AT_ONCE = 10_000
# Columns that are no part of an example.
_ONLY_COUNTED = ["row", "is_truncated", "is_dropped", "problem", "unused_columns", "notices"]


@dataclass(frozen=True)
class EncodingReport:
    """What became of rows, for the log and for statistics.

    Attributes:
        num_rows: Rows of which there are examples.
        num_examples: Examples that are used.
        num_dropped: Examples that are left out, since they are too long.
        num_too_long: Rows of which all examples are left out for that.
        num_truncated: Examples that are cut.
        bad_rows: Rows that are left out, since they are malformed, counted by what is wrong with them.
        unused_columns: Columns of rows that people mean to be used, and that are not.
        notices: What is to be known of conversations: the first notice of each kind, with the number of rows that have
            one of this kind.
    """

    num_rows: int
    num_examples: int
    num_dropped: int = 0
    num_too_long: int = 0
    num_truncated: int = 0
    bad_rows: BadRowCounts = field(default_factory=BadRowCounts)
    unused_columns: Sequence[str] = ()
    notices: Mapping[Notice, int] = field(default_factory=dict)

    @property
    def counts_examples(self) -> bool:
        """Whether some row became several examples, left out or not: then a number of examples is no number of rows."""
        return self.num_examples + self.num_dropped > self.num_rows + self.num_too_long


@dataclass(frozen=True)
class EncodedRows:
    """Tokenised rows and what became of the over-long ones.

    Attributes:
        dataset: The examples that are not dropped, with the columns `prompt`, `output`, `ground_truth` (`ExampleText`),
            `as_written`, `input_ids`, `num_prompt_tokens`, `excluded_spans` (`Example`), `num_tokens`,
            `num_response_tokens` (labels that count in the loss) and `location` (`line 3`, or of several sources
            `line 3 of b.jsonl`).
        row_numbers: Which row each example comes from, of all sources together, `(num_examples,)`.
        sizes: The numbers of examples of each source in `dataset`.
        num_dropped: The numbers of examples of each source that are left out, since they are too long.
        report: What became of the rows.
    """

    dataset: Dataset
    row_numbers: NDArray[np.integer[Any]]
    sizes: list[int]
    num_dropped: list[int]
    report: EncodingReport


def encode_rows(sources: Sequence[Source], encoder: RowEncoder, num_proc: int | None = None) -> EncodedRows:
    """Tokenise all rows; results are cached on disk by the content of everything they depend on."""
    key = encoder.fingerprint()
    # Alone, the same rows by another name are the same, and are found in the cache.
    keep_names = len(sources) > 1
    encoded = [_encode_source(source, encoder, key, keep_names, num_proc) for source in sources]
    return _collect(encoded, list(accumulate((len(source.rows) for source in sources[:-1]), initial=0)))


def _collect(encoded: Sequence[Dataset], first_rows: Sequence[int]) -> EncodedRows:
    """Examples of all sources, without those that are dropped; the rows of each are counted from a first one on."""
    dropped = [read_numbers(part, "is_dropped") for part in encoded]
    parts = [
        part.select(np.flatnonzero(~out)) if out.any() else part for part, out in zip(encoded, dropped, strict=True)
    ]
    dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    numbers = [first + read_numbers(part, "row") for part, first in zip(parts, first_rows, strict=True)]
    row_numbers = np.concatenate(numbers)
    bad_rows = [_read_bad_rows(part) for part in encoded]
    num_dropped = [int(out.sum()) - len(bad) for out, bad in zip(dropped, bad_rows, strict=True)]
    num_rows, num_bad = len(np.unique(row_numbers)), sum(map(len, bad_rows))
    report = EncodingReport(
        num_rows=num_rows,
        num_examples=len(dataset),
        num_dropped=sum(num_dropped),
        num_too_long=sum(len(np.unique(read_numbers(part, "row"))) for part in encoded) - num_rows - num_bad,
        num_truncated=int(read_numbers(dataset, "is_truncated").sum()),
        bad_rows=BadRowCounts(chain(*bad_rows)),
        unused_columns=sorted(set().union(*map(_read_unused_columns, encoded))),
        notices=_count_notices(dataset, row_numbers),
    )
    return EncodedRows(dataset.remove_columns(_ONLY_COUNTED), row_numbers, list(map(len, parts)), num_dropped, report)


def _read_bad_rows(part: Dataset) -> list[BadRow]:
    is_bad = part.data.column("problem").is_valid().to_numpy()
    if not is_bad.any():
        return []
    found = part.select(np.flatnonzero(is_bad)).select_columns(["location", "problem"])
    return [BadRow(**row) for row in found.to_list()]


def _read_unused_columns(part: Dataset) -> set[str]:
    return set(pc.unique(pc.list_flatten(part.data.column("unused_columns"))).to_pylist())


def _count_notices(dataset: Dataset, row_numbers: NDArray[np.integer[Any]]) -> dict[Notice, int]:
    """The first notice of each kind, with the number of rows that have one of this kind."""
    # Most rows have no notices, and are not looked at one by one.
    noticed = np.flatnonzero(_in_order(dataset, pc.list_value_length(dataset.data.column("notices"))))
    first: dict[str, Notice] = {}
    rows: dict[str, set[int]] = {}
    found = dataset.select(noticed).select_columns("notices")
    for row, example in zip(row_numbers[noticed].tolist(), found, strict=True):
        for notice in example["notices"]:
            kind = notice["kind"]
            first.setdefault(kind, Notice(**notice))
            rows.setdefault(kind, set()).add(row)
    return {notice: len(rows[kind]) for kind, notice in first.items()}


def _num_cores() -> int:
    """Those that this process may run on: a job of a cluster, or a container, may have few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode_source(source: Source, encoder: RowEncoder, key: str, keep_name: bool, num_proc: int | None) -> Dataset:
    raw = source.rows
    workers = num_proc or min(8, 1 + len(raw) // 20_000, _num_cores())
    collect_before_forking(workers if workers > 1 else 0)
    fingerprint = Hasher.hash([raw._fingerprint, source.is_json, key, source.name if keep_name else None])
    try:
        return raw.map(
            encoder,
            batched=True,
            with_indices=True,
            fn_kwargs={"source": replace(source, rows=raw.select([])), "keep_name": keep_name},
            remove_columns=raw.column_names,
            features=ENCODED_FEATURES,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=fingerprint,
            # Named here, so that rows in memory, too, are encoded to disk and found by the other processes.
            cache_file_name=str(cache_folder() / f"{fingerprint}.arrow"),
            desc=f"Tokenising {Path(source.name.strip('`')).name}",
        )
    except SettingsError as error:  # raised here again, not deep in a pool of workers: it is our own message
        raise error.with_traceback(None) from error.__cause__
    except OSError as error:  # rows have been read before: it is the cache
        raise cache_error(error) from error


def rows_in_memory(encoded: Sequence[EncodedExample]) -> EncodedRows:
    """Examples of one source as `encode_rows` returns them, without a cache."""
    return _collect([Dataset(to_table(encoded))], [0])


def read_numbers(dataset: Dataset, column: str) -> NDArray[Any]:
    """A whole column of numbers, `(num_rows,)`.

    Formatted as numpy, `datasets` would make a Python object of each number, and of rows that were selected even a
    table of each.
    """
    return _in_order(dataset, dataset.data.column(column))


def _in_order(dataset: Dataset, numbers: pa.ChunkedArray) -> NDArray[Any]:
    """One number for each row that is stored, as numbers of the rows that are selected."""
    stored: NDArray[Any] = numbers.to_numpy()
    return stored if dataset._indices is None else stored[dataset._indices.column(0).to_numpy()]


def content_hash(dataset: Dataset) -> str:
    """A hash of all token ids in their order, and of which of them are learnt.

    A run can continue at its position in the data only if this is still the same.
    """
    columns = dataset.select_columns(["input_ids", "num_prompt_tokens", "excluded_spans", "num_tokens"])
    hasher = hashlib.blake2b(digest_size=8)
    for table in columns.with_format("arrow").iter(batch_size=_ROWS_READ_AT_ONCE):
        ids, spans = (table[name].combine_chunks().flatten() for name in ("input_ids", "excluded_spans"))
        for column in (ids, table["num_prompt_tokens"], spans, table["num_tokens"]):
            hasher.update(column.to_numpy().data)
    return hasher.hexdigest()
