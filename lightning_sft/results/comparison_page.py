"""What the page of several runs holds: their curves, their settings where they differ, and their responses."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_sft.errors import shorten
from lightning_sft.generation.records import GenerationRecord
from lightning_sft.generation.report.page import write_comparison_page
from lightning_sft.results.compared_prompts import ComparedPrompt, RewardDifference
from lightning_sft.results.compared_run import ComparedRun

_OF_RESPONSE = (  # fields of a record that the page shows
    *("sample", "response", "format_reward", "answer_reward", "reward", "reward_error"),
    *("token_entropy", "response_length", "stop_reason"),
)
_MOST_POINTS = 800  # of a curve: more than a screen shows
_MOST_TOKENS = 1_500_000  # on the page, some 40 MB; the texts of all responses are there in any case


def write_page_of_runs(
    path: Path,
    runs: Sequence[ComparedRun],
    prompts: Sequence[ComparedPrompt],
    summaries: Sequence[Mapping[str, float]],
    differences: Sequence[RewardDifference],
) -> None:
    """Write the page; `summaries` are of each run's responses, `differences` in reward of each run but the first.

    Raises:
        OSError: If the file cannot be written.
    """
    heads = [
        {
            "name": run.name,
            "path": str(run.path),
            "step": run.step,
            "num_responses": len(run.records),
            "notes": run.notes,
            "summary": summary,
            "difference": vars(difference) if difference else None,
        }
        for run, summary, difference in zip(runs, summaries, [None, *differences], strict=True)
    ]
    tokens = _with_tokens(prompts)
    lines: list[str] = []
    shown = [
        {
            "index": index,
            "prompt": prompt.prompt,
            "ground_truths": prompt.ground_truths,
            "responses": [
                [_response(record, lines if index in tokens else None) for record in records]
                for records in prompt.responses
            ],
        }
        for index, prompt in enumerate(prompts)
    ]
    settings = [
        {"name": name, "values": [None if value is None else _in_words(value) for value in values]}
        for name, values in differing_settings(runs).items()
    ]
    write_comparison_page(path, runs=heads, curves=_curves(runs), settings=settings, prompts=shown, tokens=lines)


def _response(record: GenerationRecord, lines: list[str] | None) -> dict[str, Any]:
    """A response; its tokens become a line, which is only read when they are shown."""
    log_probs = [value for value in record.token_log_probs or () if value is not None]
    shown = {name: getattr(record, name) for name in _OF_RESPONSE}
    shown |= {"log_prob": sum(log_probs) / len(log_probs) if log_probs else None, "line": None}
    if lines is not None and record.tokens:
        shown["line"] = len(lines)
        values = map(_rounded, (record.token_log_probs, record.token_entropies))
        lines.append(json.dumps([record.tokens, record.token_ids or [], *values], separators=(",", ":")))
    return shown


def _rounded(values: Sequence[float | None] | None) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else round(value, 3) for value in values or ()]


def _with_tokens(prompts: Sequence[ComparedPrompt]) -> set[int]:
    """The prompts whose tokens are on the page if it cannot hold those of all: where the runs differ most comes first.

    Those are prompts with different rewards, then with different responses, each in their order.
    """

    def sameness(index: int) -> int:
        prompt = prompts[index]
        rewards = {prompt.reward(run) for run in range(len(prompt.responses))} - {None}
        texts = {tuple(record.response for record in records) for records in prompt.responses if records}
        return 0 if len(rewards) > 1 else 1 if len(texts) > 1 else 2

    chosen, left = set(), _MOST_TOKENS
    for index in sorted(range(len(prompts)), key=sameness):
        left -= sum(len(record.tokens or ()) for records in prompts[index].responses for record in records)
        if left < 0:
            break
        chosen.add(index)
    return chosen


def _curves(runs: Sequence[ComparedRun]) -> dict[str, list[list[list[float]]]]:
    """By metric, the points of each run; none of a run that does not have it."""
    tables = [pd.DataFrame() if run.metrics is None else run.metrics for run in runs]
    names = dict.fromkeys(str(name) for table in tables for name in table.columns)
    found = {
        name: [_points(table[name]) if name in table.columns else [] for table in tables]
        for name in names
        if name != "epoch"
    }
    return {name: curves for name, curves in found.items() if any(curves)}


def _points(curve: pd.Series) -> list[list[float]]:
    """Steps and values. Of a long curve the least and the greatest value of each stretch, so that no peak is lost."""
    values = pd.to_numeric(curve, errors="coerce").astype(float)
    values = values[np.isfinite(values)]
    if len(values) > _MOST_POINTS:
        stretches = np.array_split(np.arange(len(values)), _MOST_POINTS // 2)
        ends = [
            (part[extreme(values.iloc[part])]) for part in stretches for extreme in (np.argmin, np.argmax) if part.size
        ]
        values = values.iloc[sorted({0, len(values) - 1, *map(int, ends)})]
    return [[int(step), float(f"{value:.6g}")] for step, value in values.items()]


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """The settings in which those runs differ that have some, a value of each run; None where it lacks the setting."""
    flat = [dict(_flat(run.settings)) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    return {
        name: [settings.get(name) for settings in flat]
        for name in names
        if len({_in_words(settings.get(name)) for settings in flat if settings}) > 1
    }


def _in_words(value: Any) -> str:
    return value if isinstance(value, str) else shorten(value, 300)


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
