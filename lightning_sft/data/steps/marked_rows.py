"""Tokens as the model will see them, coloured where they count in the loss, for notebooks and terminals."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.microbatch import Microbatch
from lightning_sft.data.tokens.tokenization import token_texts
from lightning_sft.errors import counted

_NOTEBOOK_ROWS, _NOTEBOOK_TOKENS = 8, 180  # rows of a batch; tokens of a row
# Two of each, for neighbours, so that every token can be told from the next: prompt, then response.
_HTML_SHADES = (("#80808018", "#80808038"), ("#2ea04355", "#2ea04388"))
_TERMINAL_SHADES = (("grey53", "grey42"), ("black on #8fd694", "black on #6fbf78"))


@dataclass(frozen=True)
class MarkedRow:
    """One sequence of a microbatch.

    Attributes:
        location: Where the row comes from, such as `line 3`; may be empty.
        ids: Its token ids: the first input, then all labels.
        is_response: For each of them, whether it counts as a label. The first is no label.
        num_padding: How many labels follow that are padding: all alike, and none of them counts.
        pad_id: The id that these have.
    """

    location: str
    ids: list[int]
    is_response: list[bool]
    num_padding: int = 0
    pad_id: int = 0

    def __str__(self) -> str:
        counts = f"{counted(len(self.ids), 'token')}, {counted(sum(self.is_response), 'response token')}"
        return f"{self.location}: {counts}" if self.location else counts

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
                yield None, [(0, f" … {counted(start - last, 'token')} … ")]
            for mark, positions in groupby(range(start, end), key=self.is_response.__getitem__):
                yield mark, [(position, texts[position]) for position in positions]
            last = end
        if self.num_padding:
            yield None, [(0, f" {self.num_padding:,} \N{MULTIPLICATION SIGN} {_texts(tokenizer, [self.pad_id])[0]}")]


def marked_rows(microbatch: Microbatch) -> Iterator[MarkedRow]:
    """The sequences of a packed or padded microbatch, marked by its own `response_mask` and nothing else."""
    if not microbatch.num_sequences:
        return
    inputs, labels, masks = (
        tensor.tolist() for tensor in (microbatch.input_ids, microbatch.labels, microbatch.response_mask)
    )
    spans = [(row, 0, length) for row, length in enumerate(microbatch.lengths)]
    if microbatch.packing is not None:
        spans = [(0, start, end) for start, end in pairwise(microbatch.packing.cu_seq_lens.tolist())]
    for location, (row, start, end) in zip(microbatch.locations, spans, strict=True):
        yield MarkedRow(
            location=location,
            ids=[inputs[row][start], *labels[row][start:end]],
            is_response=[False, *masks[row][start:end]],
            num_padding=len(labels[row]) - end if microbatch.packing is None else 0,
            pad_id=labels[row][-1],
        )


def batch_html(rows: Sequence[MarkedRow], tokenizer: PreTrainedTokenizerBase | None, note: str = "") -> str:
    """The first rows of a batch for a notebook, under a line that says how many there are and ends in the note."""
    num_tokens, num_response = sum(len(row.ids) for row in rows), sum(sum(row.is_response) for row in rows)
    head = (
        f"{counted(len(rows), 'sequence')}, {counted(num_tokens, 'token')}, "
        f"{counted(num_response, 'response token')} ({percent(num_response, num_tokens)}, coloured){note}"
    )
    more = len(rows) - _NOTEBOOK_ROWS
    tail = f"<div>… and {counted(more, 'sequence')} more</div>" if more > 0 else ""
    return f"<div><b>{head}</b></div>{rows_html(rows[:_NOTEBOOK_ROWS], tokenizer)}{tail}"


def rows_html(rows: Iterable[MarkedRow], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Rows for a notebook, each under a line with its location and size."""
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


def terminal_text(mark: bool | None, tokens: list[tuple[int, str]], coloured: bool) -> Text:
    """One of a row's `runs` for a terminal; where it has no colours, a bar ends each token."""
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


def percent(part: int, whole: int) -> str:
    """A part of a whole, such as `25.0%`."""
    return f"{part / whole:.1%}" if whole else "0%"
