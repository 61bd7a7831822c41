"""Records as pages to read: each step's responses, an index that walks through the steps, a table for notebooks.

A page is one file that loads nothing from elsewhere. What a model wrote stands in it as JSON alone and is shown as
text; the page's policy allows the one script that comes with it, so markup in a response is never more than text.
"""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_INDEX = "index.html"
_TABLE_CHARACTERS = 180_000  # of a notebook's table: a notebook keeps every table it has ever shown
_NOTHING = "\N{EN DASH}"
_CELL = "text-align:left;vertical-align:top;padding:.5em .8em;border-top:1px solid rgba(128,128,128,.35)"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;text-align:left"


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

    Raises:
        OSError: If the file cannot be written.
    """
    data = {"title": title, "summary": summary, "num_records": num_records or len(records), "records": records}
    _write(path, _filled("page", _json(data)))


def update_index(folder: Path, step: int, page: str, summary: Mapping[str, float]) -> None:
    """Add a step to `index.html`, which charts the summaries and opens each step's page; or replace it there.

    An `index.html` that something else has written, or of which a part cannot be read, is kept as `index.html.bak`.

    Args:
        folder: Where the index and the pages are.
        step: The step, in optimizer steps.
        page: Its page's file name, relative to `folder`.
        summary: Averages, by name.

    Raises:
        OSError: If the file cannot be read or written.
    """
    index = folder / _INDEX
    before = index.read_bytes() if index.exists() else b""
    steps, complete = _steps_of(before.decode("utf-8", "replace"))
    if before and not complete:
        index.with_name(f"{_INDEX}.bak").write_bytes(before)
    steps[step] = {"step": step, "page": page, "summary": summary}
    _write(index, _filled("page_index", "[\n" + ",\n".join(_json(steps[step]) for step in sorted(steps)) + "\n]"))


def records_table(records: Sequence[Mapping[str, Any]], limit: int = 20) -> str:
    """A table for notebooks, as HTML without script or style sheet; tokens are coloured by their entropy.

    Args:
        records: As for `write_page`.
        limit: Most rows. Texts are cut so that 60 rows stay below some 200 KB.
    """
    shown = records[:limit]
    room = max(_TABLE_CHARACTERS // max(len(shown), 1), 3_000)
    head = "".join(f'<th style="{_CELL}">{name}</th>' for name in ("", "prompt", "response", "result"))
    rows = "".join(
        f'<tr style="background:transparent">{"".join(f"<td style={_CELL!r}>{cell}</td>" for cell in cells)}</tr>'
        for cells in (_cells(record, room) for record in shown)
    )
    rest = f"<p>… and {len(records) - len(shown):,} more</p>" if len(records) > len(shown) else ""
    # The classes keep notebooks from taking what stands between two dollar signs for a formula.
    table = (
        '<div class="tex2jax_ignore mathjax_ignore" style="overflow-x:auto">'
        f'<table style="width:100%"><tr>{head}</tr>{rows}</table>{rest}</div>'
    )
    return table.encode("utf-8", "replace").decode()  # half a surrogate pair could not be saved in a notebook


# -- files -----------------------------------------------------------------------------------------------------------


def _filled(template: str, data: str) -> str:
    """A template with its style sheet, its data, and a policy that lets no other script run."""
    here = Path(__file__)
    text = here.with_name(f"{template}.html").read_text(encoding="utf-8")
    text = text.replace("/* page.css */", here.with_name("page.css").read_text(encoding="utf-8"))
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    before, _, after = text.replace("SCRIPT_HASH", f"sha256-{digest}").partition("DATA")
    return before + data + after


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")  # the script's hash is of these very bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _json(value: object) -> str:
    """JSON that can stand in HTML: ASCII, so that half a surrogate pair can be written too, and without a `<`."""
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Without NaN and infinities, which JSON does not have, and to four decimals, which are all that is shown."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
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


# -- the table -------------------------------------------------------------------------------------------------------


def _cells(record: Mapping[str, Any], room: int) -> tuple[str, str, str, str]:
    prompt = _cut([html.escape(char) for char in record.get("prompt") or ""], room // 4, head=0.0)
    if len(prompt) > 400:
        end = html.escape(record["prompt"][-160:].partition(" ")[2] or record["prompt"][-80:])
        prompt = f"<details><summary>… {end}</summary><div style='{_TEXT}'>{prompt}</div></details>"
    texts = record.get("tokens") or [*(record.get("response") or "")]
    entropies = record.get("token_entropies") or []
    entropies = entropies if len(entropies) == len(texts) else [None] * len(texts)
    tokens = [_coloured(html.escape(text), entropy) for text, entropy in zip(texts, entropies, strict=True)]
    result = [
        f"<b>reward {_number(record.get('reward'))}</b>",
        f"format {_number(record.get('format_reward'))}, answer {_number(record.get('answer_reward'))}",
        f"expected {_short(record.get('ground_truth'))}",
        f"{_number(record.get('response_length'))} tokens, {_number(record.get('token_entropy'))} nats",
        f"ended by {_short(record.get('stop_reason'))}",
    ]
    if record.get("reward_error") is not None:
        result.append(f"reward failed: {_short(record['reward_error'])}")
    return (
        _short(record.get("index")),
        f"<div style='{_TEXT};min-width:12em'>{prompt}</div>",
        f"<div style='{_TEXT};min-width:16em'>{_cut(tokens, room - len(prompt) - 1_000, head=0.7)}</div>",
        f"<div style='text-align:left;min-width:11em'>{'<br>'.join(result)}</div>",
    )


def _coloured(text: str, entropy: float | None) -> str:
    if entropy is None or not entropy >= 0.05 or not text:
        return text
    strength = 0.6 * min(entropy / 3, 1) ** 0.7
    return f'<span style="background:#f57d1e{round(255 * strength):02x}" title="{entropy:.2f} nats">{text}</span>'


def _cut(pieces: Iterable[str], room: int, head: float) -> str:
    """Joined, but where they take more than `room`: a share `head` of it from their start, the rest from their end."""
    pieces = list(pieces)
    if sum(map(len, pieces)) <= room:
        return "".join(pieces)

    def fitting(pieces: Iterable[str], room: float) -> list[str]:
        taken: list[str] = []
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                break
            taken.append(piece)
        return taken

    start, end = fitting(pieces, room * head), fitting(reversed(pieces), room * (1 - head))
    return "".join(start) + " … " + "".join(reversed(end))


def _number(value: float | None) -> str:
    return _NOTHING if value is None or not math.isfinite(value) else f"{value:,.3f}".rstrip("0").rstrip(".")


def _short(value: object) -> str:
    return _NOTHING if value is None else html.escape(str(value)[:200])
