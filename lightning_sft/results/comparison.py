"""`compare_runs`: several runs beside one another, on a page and in numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_sft.checks import check_local, check_type
from lightning_sft.errors import SettingsError, counted, path_from_here
from lightning_sft.generation.records import summarize
from lightning_sft.results.compared_prompts import RewardDifference, match_prompts, reward_difference
from lightning_sft.results.compared_run import ComparedRun, read_compared_runs
from lightning_sft.results.comparison_page import differing_settings, write_page_of_runs

_TOLD = ("reward", "answer_reward", "response_length", "response_entropy")  # of a summary, in the terminal
_MOST_COLUMNS = 9  # of the table, in the terminal


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_runs`; `print` shows it.

    Attributes:
        page: File with curves and the responses of all runs side by side, to read in a browser.
        names: The name of each run.
        table: A row for each run: its last `val/loss`, its lowest (`lowest val/loss`) and the optimizer step of that
            (`at step`), then the settings in which the runs differ; without columns if nothing of this is known.
        summaries: Averages over each run's responses: rewards, lengths and entropy, as in the summary of
            `log_generations`; empty for a run without responses.
        differences: The reward of each run but the first, minus that of the first.
        num_prompts: Number of prompts that at least one run has answered.
        num_common: Number of prompts that all runs have answered.
        notes: Messages on what could not be read of a run.
    """

    page: Path
    names: list[str]
    table: pd.DataFrame = field(repr=False)
    summaries: list[dict[str, float]]
    differences: list[RewardDifference]
    num_prompts: int
    num_common: int
    notes: list[str]

    def __str__(self) -> str:
        lines = [*self.notes, *self._table_lines()]
        for name, summary in zip(self.names, self.summaries, strict=True) if self.num_prompts else ():
            found = [f"{key} {summary[key]:.3f}" for key in _TOLD if not math.isnan(summary.get(key, math.nan))]
            lines.append(f"{name}: {', '.join(found) or 'no responses'}")
        if self.num_prompts:
            lines.append(f"{counted(self.num_prompts, 'prompt')}, {self.num_common:,} of them common to all runs.")
        for name, summary, difference in zip(self.names[1:], self.summaries[1:], self.differences, strict=True):
            if summary and self.summaries[0]:
                lines.append(f"Reward of {name} above {self.names[0]}: {difference}")
        return "\n".join([*lines, f"Page: {path_from_here(self.page)}"])

    def _table_lines(self) -> list[str]:
        if self.table.empty:
            return []
        shown = self.table.iloc[:, :_MOST_COLUMNS].map(_cell).to_string(max_colwidth=40)
        left = self.table.shape[1] - _MOST_COLUMNS
        return [*shown.splitlines(), *([f"{counted(left, 'further difference')} on the page."] if left > 0 else [])]


def compare_runs(
    runs: Sequence[str | Path],
    output: str | Path = "comparison.html",
    names: Sequence[str] | None = None,
    step: int | None = None,
) -> Comparison:
    """Compare runs on a page: their curves, and their answers to the same prompts.

    Prompts are matched by their text. The difference in reward between two runs is a mean over the prompts for which
    both have a reward, each with all of its samples, with a 95% interval by the paired bootstrap, whose seed is fixed.

    Args:
        runs: At least two, each the folder of a run or a file of records: one that `predict` wrote, or one from a run's
            folder `generations`. The others are compared with the first, such as the base model.
        output: File of the page, ending in .html; an existing page is replaced.
        names: Names of the runs. Default: the parts of their paths in which they differ.
        step: Optimizer step of each folder whose responses are compared. Default: the last of each.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        MissingFileError: If there is no such folder or file.
        SettingsError: If there are less than two runs, one twice, or one that cannot be read, or the page cannot be
            written.
    """
    check_type("output", output, (str, Path), "a file ending in .html")
    check_local("output", output)
    path = Path(output).expanduser()
    if path.suffix != ".html":
        raise SettingsError(f"`output` is {str(output)!r}, expected a file ending in .html.")
    compared = read_compared_runs(runs, names, step)
    prompts = match_prompts([run.records for run in compared])
    differences = [reward_difference(prompts, run) for run in range(1, len(compared))]
    summaries = [summarize(run.records) if run.records else {} for run in compared]
    try:
        write_page_of_runs(path, compared, prompts, summaries, differences)
    except OSError as error:
        raise SettingsError(f"`output` is {str(output)!r}, which cannot be written: {error.strerror}.") from error
    return Comparison(
        page=path,
        names=[run.name for run in compared],
        table=_table(compared),
        summaries=summaries,
        differences=differences,
        num_prompts=len(prompts),
        num_common=sum(all(prompt.responses) for prompt in prompts),
        notes=[note for run in compared for note in run.notes],
    )


def _table(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    table = pd.DataFrame([_losses(run.metrics) for run in runs], index=[run.name for run in runs])
    return table.astype({"at step": "Int64"} if len(table.columns) else {}).assign(**differing_settings(runs))


def _cell(value: Any) -> str:
    is_known = value is not None and value is not pd.NA and value == value
    return f"{value:.6g}" if is_known and isinstance(value, float) else str(value) if is_known else "-"


def _losses(metrics: pd.DataFrame | None) -> dict[str, Any]:
    curve = [] if metrics is None else metrics.get("val/loss", [])
    losses = pd.to_numeric(pd.Series(curve, dtype=object), errors="coerce").dropna()
    if losses.empty:
        return {}
    return {"val/loss": losses.iloc[-1], "lowest val/loss": losses.min(), "at step": losses.idxmin()}
