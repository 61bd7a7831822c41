"""Data as the model will see it: tokens, coloured where they count in the loss, and statistics."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from itertools import groupby, islice, pairwise
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokenization import token_texts

_NOTEBOOK_ROWS, _NOTEBOOK_TOKENS, _TERMINAL_TOKENS = 8, 180, 500  # rows of a batch; tokens of a row
# Two of each, for neighbours, so that every token can be told from the next: prompt, then response.
_HTML_SHADES = (("#80808018", "#80808038"), ("#2ea04355", "#2ea04388"))
_TERMINAL_SHADES = (("grey53", "grey42"), ("black on #8fd694", "black on #6fbf78"))


@dataclass(frozen=True)
class MarkedRow:
    """One sequence of a batch.

    Args:
        where: Its place in the data, such as `line 3`; may be empty.
        ids: Its token ids: the first input, then all labels.
        is_response: For each of them, whether it counts as a label. The first is no label.
        num_padding: How many labels follow that are padding: all alike, and none of them counts.
        pad_id: The id that these have.
    """

    where: str
    ids: list[int]
    is_response: list[bool]
    num_padding: int = 0
    pad_id: int = 0

    def __str__(self) -> str:
        counts = f"{_count(len(self.ids), 'token')}, {_count(sum(self.is_response), 'response token')}"
        return f"{self.where}: {counts}" if self.where else counts

    def runs(
        self, tokenizer: PreTrainedTokenizerBase | None, limit: int
    ) -> Iterator[tuple[bool | None, list[tuple[int, str]]]]:
        """Neighbours with the same mark, each as its position and text; None marks what is said about the others.

        Args:
            tokenizer: Without one the texts are ids.
            limit: Of longer rows no more than so many tokens are shown, and the middle of the prompt, then that of the
                response, is left out.
        """
        texts, last = _texts(tokenizer, self.ids), 0
        for start, end in _shown(self.is_response, limit):
            if start > last:
                yield None, [(0, f" … {_count(start - last, 'token')} … ")]
            for mark, positions in groupby(range(start, end), key=self.is_response.__getitem__):
                yield mark, [(position, texts[position]) for position in positions]
            last = end
        if self.num_padding:
            yield None, [(0, f" {self.num_padding:,} \N{MULTIPLICATION SIGN} {_texts(tokenizer, [self.pad_id])[0]}")]


def marked_rows(microbatch: dict[str, Any]) -> Iterator[MarkedRow]:
    """The sequences of a packed or padded microbatch, marked by its own `response_mask` and nothing else."""
    if microbatch.get("num_sequences") == 0:  # a stand-in
        return
    inputs, labels, masks = (microbatch[name].tolist() for name in ("input_ids", "labels", "response_mask"))
    bounds = microbatch.get("cu_seq_lens_q")
    spans = [(row, 0, len(ids)) for row, ids in enumerate(labels)]
    if bounds is not None:
        spans = [(0, start, end) for start, end in pairwise(bounds.tolist())]
    places = microbatch.get("rows", [])
    for number, (row, start, end) in enumerate(spans):
        # A batch does not say how long its rows are: what ends one unmasked and alike is shown as a number of times.
        length, pad_id = end, labels[row][end - 1]
        while bounds is None and end > start + 1 and not masks[row][end - 1] and labels[row][end - 1] == pad_id:
            end -= 1
        yield MarkedRow(
            where=places[number] if len(places) == len(spans) else "",
            ids=[inputs[row][start], *labels[row][start:end]],
            is_response=[False, *masks[row][start:end]],
            num_padding=length - end,
            pad_id=pad_id,
        )


class StepBatch(dict[str, Any]):
    """What an optimizer step needs, as the dictionary that it is; a notebook shows its rows, coloured by their mask.

    Moved to a device it shows ids. Copies and pickles are ordinary dictionaries.

    Args:
        batch: Has `microbatches`; see `SFTDataModule`.
        tokenizer: Turns ids into texts. None: ids are shown.
    """

    def __init__(self, batch: Any = (), tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(batch)
        self._tokenizer = tokenizer

    def __reduce__(self) -> tuple[type[OrderedDict], tuple[()], None, None, Iterator[tuple[str, Any]]]:
        # A file needs neither this class nor the tokenizer, and torch loads this type with `weights_only`.
        return OrderedDict, (), None, None, iter(self.items())

    def _repr_html_(self) -> str:
        rows = [row for microbatch in self["microbatches"] for row in marked_rows(microbatch)]
        num_tokens, num_response = sum(len(row.ids) for row in rows), sum(sum(row.is_response) for row in rows)
        head = (
            f"{_count(len(rows), 'sequence')}, {_count(num_tokens, 'token')}, "
            f"{_count(num_response, 'response token')} ({_share(num_response, num_tokens)}, coloured), "
            f"{_count(len(self['microbatches']), 'microbatch', 'es')}"
        )
        more = len(rows) - _NOTEBOOK_ROWS
        tail = f"<div>… and {_count(more, 'sequence')} more</div>" if more > 0 else ""
        return f"<div><b>{head}</b></div>{_html(islice(rows, _NOTEBOOK_ROWS), self._tokenizer)}{tail}"


@dataclass(frozen=True)
class SplitStatistics:
    """What a split holds.

    Args:
        num_tokens: Of each row, prompt and response, `(num_rows,)`.
        num_response_tokens: Of each row, the labels that count in the loss, `(num_rows,)`.
        num_dropped: Rows of its data that were too long.
        num_truncated: Rows of its data that were cut.
        steps_per_epoch: Optimizer steps; None if the split is not trained on.
        sources: How many rows it has of each source; empty if an epoch takes every row once.
    """

    num_tokens: np.ndarray
    num_response_tokens: np.ndarray
    num_dropped: int = 0
    num_truncated: int = 0
    steps_per_epoch: int | None = None
    sources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Preview:
    """Rows and statistics; `print`, `rich` and notebooks show them.

    Args:
        rows: Some of the training rows.
        splits: By name, `train` and, if there are such rows, `val`.
        tokenizer: Of the rows.
        limit: Why rows were dropped or truncated.
    """

    rows: Sequence[MarkedRow]
    splits: dict[str, SplitStatistics]
    tokenizer: PreTrainedTokenizerBase = field(compare=False)
    limit: str = ""

    def _table(self) -> list[tuple[str, list[str]]]:
        """What is counted, and a value for each split."""
        splits = list(self.splits.values())
        lines = [("rows", [f"{len(split.num_tokens):,}" for split in splits])]
        lines += [
            (source, [f"{split.sources[source]:,}" if split.sources else "" for split in splits])
            for source in dict.fromkeys(source for split in splits for source in split.sources)
        ]
        for word, counts in (
            ("dropped", [split.num_dropped for split in splits]),
            ("truncated", [split.num_truncated for split in splits]),
        ):
            if any(counts):
                lines.append((f"{word}, {self.limit}", [f"{count:,}" for count in counts]))
        lines.append(("tokens", [f"{split.num_tokens.sum():,}" for split in splits]))
        shares = [_share(split.num_response_tokens.sum(), split.num_tokens.sum()) for split in splits]
        lines.append(("of these response tokens", shares))
        for word, percent in (("shortest", 0), ("median", 50), ("95th percentile", 95), ("longest", 100)):
            values = [np.percentile(split.num_tokens, percent, method="nearest") for split in splits]
            lines.append((f"tokens of a row, {word}", [f"{value:,}" for value in values]))
        steps = [f"{split.steps_per_epoch:,}" if split.steps_per_epoch else "" for split in splits]
        return [*lines, ("optimizer steps per epoch", steps)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        for row in self.rows:
            yield Text(str(row), style="bold")
            grid = Table.grid("", "", padding=(0, 2, 0, 0))
            for mark, tokens in row.runs(self.tokenizer, _TERMINAL_TOKENS):
                label = "" if mark is None else "response" if mark else "prompt"
                grid.add_row(label, _terminal_text(mark, tokens, coloured))
            yield grid
            yield ""
        table = Table("", *self.splits, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, values in self._table():
            table.add_row(name, *values)
        yield table

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
        return f"{_html(self.rows, self.tokenizer)}<table style='color:inherit'>{''.join(lines)}</table>"


def _html(rows: Iterable[MarkedRow], tokenizer: PreTrainedTokenizerBase | None) -> str:
    parts = []
    for row in rows:
        parts.append(f"<div style='margin-top:.6em'>{escape(str(row))}</div>")
        parts.append("<div style='font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;text-align:left'>")
        for mark, tokens in row.runs(tokenizer, _NOTEBOOK_TOKENS):
            texts = [(position, escape(_visible(text), quote=False)) for position, text in tokens]
            if mark is not None:
                shades = _HTML_SHADES[mark]
                texts = [(at, f"<span style=background:{shades[at % 2]}>{text}</span>") for at, text in texts]
            run = "".join(text for _, text in texts)
            parts.append(run if mark else f"<span style='opacity:.6'>{run}</span>")
        parts.append("</div>")
    return "".join(parts)


def _terminal_text(mark: bool | None, tokens: list[tuple[int, str]], coloured: bool) -> Text:
    bar = "" if mark is None or coloured else "│"
    text = Text(bar, overflow="fold")
    for position, token in tokens:
        style = "dim" if mark is None else _TERMINAL_SHADES[mark][position % 2]
        shown = _visible(token)
        text.append(shown.removesuffix("\n"), style).append(bar)
        if shown.endswith("\n"):
            text.append(f"\n{bar}")
    return text


def _texts(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> list[str]:
    return [f" {token_id}" for token_id in ids] if tokenizer is None else token_texts(tokenizer, ids)


def _visible(text: str) -> str:
    """A token with its special characters shown; one that holds a part of a character is a dot."""
    shown = {"\n": "↵\n", "\t": "⇥", "\r": "␍"}
    return "".join(c if c.isprintable() else shown.get(c) or ascii(c)[1:-1] for c in text) or "·"


def _shown(is_response: list[bool], limit: int) -> list[tuple[int, int]]:
    """Where the shown stretches of a row begin and end: at most `limit` tokens of it."""
    length = len(is_response)
    if length <= limit:
        return [(0, length)]
    first = is_response.index(True) if any(is_response) else length
    num_prompt = min(first, max(limit - (length - first), limit // 4))
    stretches = []
    for start, end, room in ((0, first, num_prompt), (first, length, limit - num_prompt)):
        if end - start <= room:
            stretches.append((start, end))
        else:
            stretches += [(start, start + room // 2), (end - (room - room // 2), end)]
    return stretches


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"
