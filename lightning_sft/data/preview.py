"""The first training rows as the model will see them, and statistics of the data."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from io import StringIO

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.encoding import Encoding
from lightning_sft.data.prepared_rows import PreparedRows, SplitStatistics
from lightning_sft.data.steps.marked_rows import MarkedRow, marked_rows, percent, rows_html, terminal_text
from lightning_sft.data.steps.step_loader import ExampleReader
from lightning_sft.data.streamed_rows import TrainingRows
from lightning_sft.data.tokens.collation import collate_packed

_TERMINAL_TOKENS = 500  # of a row


def preview_rows(
    train: TrainingRows,
    val: PreparedRows | None,
    num_rows: int,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
) -> "Preview":
    """The first `num_rows` training rows as the model will see them, and what the splits hold."""
    splits = {train.label: train.statistics()}
    if val is not None:
        splits[val.label] = replace(val.statistics(), steps_per_epoch=None)
    examples = ExampleReader(train.rows).read(list(range(min(num_rows, len(train.rows)))))
    return Preview(list(marked_rows(collate_packed(examples))), splits, tokenizer, encoding.limit_in_words)


@dataclass(frozen=True, repr=False)
class Preview:
    """Some training rows, and statistics of the splits by name; `print`, `rich` and notebooks show them.

    The limit says why rows were dropped or truncated.
    """

    rows: Sequence[MarkedRow]
    splits: dict[str, SplitStatistics]
    tokenizer: PreTrainedTokenizerBase = field(compare=False)
    limit: str = ""

    def _table(self) -> list[tuple[str, list[str]]]:
        """What is counted, and a value for each split."""
        splits = list(self.splits.values())
        lines = [("rows", [f"{split.report.num_rows:,}" for split in splits])]
        counts_examples = any(split.report.counts_examples for split in splits)
        if counts_examples:
            lines.append(("examples, one for each turn", [f"{len(split.num_tokens):,}" for split in splits]))
        lines += [
            (source, [f"{split.sources[source]:,}" if split.sources else "" for split in splits])
            for source in dict.fromkeys(source for split in splits for source in split.sources)
        ]
        for word, counts in (
            ("dropped", [split.report.num_dropped for split in splits]),
            ("truncated", [split.report.num_truncated for split in splits]),
        ):
            if any(counts):
                lines.append((f"{word}, {self.limit}", [f"{count:,}" for count in counts]))
        if any(split.report.bad_rows.total for split in splits):
            lines.append(("rows left out", [f"{split.report.bad_rows.total:,}" for split in splits]))
        lines.append(("tokens", [f"{split.num_tokens.sum():,}" for split in splits]))
        each = "an example" if counts_examples else "a row"
        shares = [percent(split.num_response_tokens.sum(), split.num_tokens.sum()) for split in splits]
        lines.append(("of these response tokens", shares))
        for word, quantile in (("shortest", 0), ("median", 50), ("95th percentile", 95), ("longest", 100)):
            values = [np.percentile(split.num_tokens, quantile, method="nearest") for split in splits]
            lines.append((f"tokens of {each}, {word}", [f"{value:,}" for value in values]))
        steps = [f"{split.steps_per_epoch:,}" if split.steps_per_epoch else "" for split in splits]
        return [*lines, ("optimizer steps per epoch", steps)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        for row in self.rows:
            yield Text(str(row), style="bold")
            grid = Table.grid("", "", padding=(0, 2, 0, 0))
            for mark, tokens in row.runs(self.tokenizer, _TERMINAL_TOKENS):
                label = "" if mark is None else "response" if mark else "prompt"
                grid.add_row(label, terminal_text(mark, tokens, coloured))
            yield grid
            yield ""
        table = Table("", *self.splits, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, values in self._table():
            table.add_row(Text(name), *values)  # no markup: a file's name may have brackets
        yield table
        for words in self._bad_rows():
            yield Text(words)

    def _bad_rows(self) -> list[str]:
        """What is wrong with rows that are left out."""
        return [f"{name}: {words}" for name, split in self.splits.items() for words in split.report.bad_rows.in_words()]

    def __str__(self) -> str:
        console = Console(file=StringIO(), color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = [("", list(self.splits)), *self._table()]
        lines = ["".join(f"<td style='text-align:right'>{value}</td>" for value in values) for _, values in table]
        lines = [f"<tr><td>{escape(name)}</td>{line}</tr>" for (name, _), line in zip(table, lines, strict=True)]
        bad_rows = "".join(f"<div>{escape(words)}</div>" for words in self._bad_rows())
        table_html = f"<table style='color:inherit'>{''.join(lines)}</table>"
        return f"{rows_html(self.rows, self.tokenizer)}{table_html}{bad_rows}"
