"""Pages to read: each step's responses, an index of the steps, rows that a model has scored, runs beside one another.

A page is one file that loads nothing from elsewhere. What a model wrote stands in it as JSON alone and is shown as
text; the page's policy allows the one script that comes with it, so markup in a response is never more than text.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_INDEX = "index.html"


@dataclass(frozen=True)
class _Page:
    """What makes up a page, of files in the folder `pages`.

    Attributes:
        template: The name of its HTML.
        shared: The names of styles and scripts that it shares with other pages, in their order; its own come last.
        words: What the template has places for.
    """

    template: str
    shared: tuple[str, ...]
    words: Mapping[str, str] = field(default_factory=dict)


_CARDS = ("shared", "elements", "tokens", "cards")
_SUMMARY = '<dl id="summary"></dl>'
_RUNS = """<div id="runs" class="card"></div>
  <details id="settings"><summary></summary><div class="card"></div></details>
  <div id="charts"></div>
  <button id="more_charts" hidden></button>"""
_PAGES = {
    "index": _Page("index", ("shared", "elements", "charts")),
    "step": _Page(
        "cards",
        (*_CARDS, "generated"),
        {"name": "Generations", "thing": "record", "searched": "answers", "head": _SUMMARY},
    ),
    "rows": _Page("cards", _CARDS, {"name": "Rows", "thing": "row", "searched": "places", "head": _SUMMARY}),
    "comparison": _Page(
        "cards",
        (*_CARDS, "generated", "charts"),
        {"name": "Runs beside one another", "thing": "prompt", "searched": "answers", "head": _RUNS},
    ),
}


def write_page(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
    *,
    title: str,
    num_records: int | None = None,
) -> None:
    """Write a page on which a step's responses can be searched, sorted and read token by token.

    Args:
        path: The HTML file; what was there before stays until the new one is complete.
        records: Lines of a `step_<N>.jsonl`; what one lacks, or has as None or NaN, is shown as a dash.
        summary: Averages, by name.
        title: Says which step and data this is.
        num_records: How many records there are in all, if these are only the first.
    """
    data = {"title": title, "summary": summary, "num_records": num_records or len(records), "records": records}
    _write(path, _filled("step", data=_json(data)))


def write_rows_page(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
    *,
    title: str,
    num_rows: int | None = None,
) -> None:
    """Write a page on which scored rows can be searched, sorted by their loss and read token by token.

    Args:
        path: The HTML file; what was there before stays until the new one is complete.
        rows: As `ScoredRow` stores them, each with its `share` of the loss of all rows, from 0 to 1. Their order does
            not matter.
        summary: `loss`, `perplexity`, `token_accuracy`, `token_entropy` and `num_rows`, of all scored rows.
        title: Says which data and which model this is.
        num_rows: How many rows were scored, if `rows` are only those with the highest loss.
    """
    # The share in per cent: its decimals are few, and with many rows each has only a small share.
    shown = [{**row, "share": 100 * row["share"]} for row in rows]
    data = {"title": title, "summary": summary, "num_rows": num_rows or len(rows), "rows": shown}
    _write(path, _filled("rows", data=_json(data)))


def write_comparison_page(
    path: Path,
    *,
    runs: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[Sequence[Sequence[float]]]],
    settings: Sequence[Mapping[str, Any]],
    prompts: Sequence[Mapping[str, Any]],
    tokens: Sequence[str],
) -> None:
    """Write a page with the curves of several runs over one another, and with their responses side by side.

    `results/comparison_page.py` makes what it shows. `tokens` has a line of JSON for each response. They are most of
    the page, and a line is only read when it is shown.
    """
    parts = {
        "data": _json({"runs": runs, "settings": settings, "prompts": prompts}),
        "curves": _in_html(json.dumps(curves, allow_nan=False, separators=(",", ":"))),  # with all of their digits
        "tokens": "\n".join(map(_in_html, tokens)),
    }
    _write(path, _filled("comparison", **parts))


def update_index(folder: Path, step: int, page: str, summary: Mapping[str, float]) -> None:
    """Add a step to `index.html`, which charts the summaries and opens each step's page; or replace it there.

    `page` is the file name of the step's page in the same folder, and `summary` has averages by name. An `index.html`
    that something else has written, or of which a part cannot be read, is kept as `index.html.bak`.
    """
    index = folder / _INDEX
    before = index.read_bytes() if index.exists() else b""
    steps, complete = _steps_of(before.decode("utf-8", "replace"))
    if before and not complete:
        index.with_name(f"{_INDEX}.bak").write_bytes(before)
    steps[step] = {"step": step, "page": page, "summary": summary}
    _write(index, _filled("index", data="[\n" + ",\n".join(_json(steps[step]) for step in sorted(steps)) + "\n]"))


def _filled(page: str, **data: str) -> str:
    """A page with its style, its script, its data by their ids, and a policy that lets no other script run."""
    folder, layout = Path(__file__).with_name("pages"), _PAGES[page]
    names = [*layout.shared, page]
    style, script = (
        "\n".join(file.read_text(encoding="utf-8") for name in names if (file := folder / f"{name}{kind}").exists())
        for kind in (".css", ".js")
    )
    template = (folder / f"{layout.template}.html").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    blocks = [f'<script type="application/json" id="{name}">{text}</script>' for name, text in data.items()]
    parts = {"hash": f"sha256-{digest}", "style": style, "script": script, "data": "\n".join(blocks)}
    parts |= layout.words
    # In one pass, so that nothing is replaced within the data.
    return re.sub(r"\{\{ (\w+) \}\}", lambda place: parts[place[1]], template)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")  # the script's hash is of these very bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _json(value: object) -> str:
    """ASCII, so that half a surrogate pair can be written too."""
    return _in_html(json.dumps(_plain(value), allow_nan=False, separators=(",", ":")))


def _in_html(text: str) -> str:
    """JSON that can stand in HTML: without a `<`."""
    return text.replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Without NaN and infinities, which JSON does not have, and to four decimals, which are all that is shown."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        kinds = set(map(type, value))  # a page can hold millions of values: those of one kind are done together
        if kinds <= {int, str}:
            return value
        if kinds == {float} and np.isfinite(rounded := np.round(value, 4)).all():
            return rounded.tolist()
        return [_plain(item) for item in value]
    return value


def _steps_of(text: str) -> tuple[dict[int, dict[str, Any]], bool]:
    """The steps of an earlier index, one a line, and whether that is all there was."""
    _, opening, block = text.partition('id="data">[\n')
    block, closing, _ = block.partition("\n]</script>")
    steps, complete = {}, bool(opening and closing)
    for line in block.splitlines() if opening else ():
        try:
            entry = json.loads(line.removesuffix(","))
            steps[int(entry["step"])] = {
                "step": int(entry["step"]),
                "page": str(entry["page"]),
                "summary": {
                    str(name): None if value is None else float(value) for name, value in entry["summary"].items()
                },
            }
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            complete = False
    return steps, complete
