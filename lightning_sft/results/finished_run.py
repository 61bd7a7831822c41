"""A run's folder, read from a program: its metrics, the records of its generations, and its settings."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lightning_sft.checks import check_type
from lightning_sft.errors import MissingFileError, SettingsError, one_line, shorten
from lightning_sft.generation.records import GenerationRecord, parse_records

_NO_COLUMNS = ("token_ids", "tokens", "token_log_probs", "token_entropies")  # of single tokens


def read_run(folder: str | Path) -> "FinishedRun":
    """Read the results in a run's folder; the run may still be going on.

    Args:
        folder: The run's folder, such as `runs/quickstart/version_0`; it has the logger's files, `generations` or both.

    Raises:
        SettingsTypeError: If `folder` is not a path.
        MissingFileError: If there is no such folder.
        SettingsError: If it contains nothing of a run.
    """
    check_type("folder", folder, (str, Path), "the folder of a run")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise MissingFileError(f"`folder` is {str(folder)!r}, but there is no such folder.")
    run = FinishedRun(path)
    if not (run.generation_steps or _metric_files(path) or (path / "checkpoints").is_dir() or run.settings):
        below = sorted({file.parent for name in ("config.yaml", "hparams.yaml") for file in path.glob(f"**/{name}")})
        hint = f" Below it is {below[-1]}." if below else ""
        raise SettingsError(f"`folder` is {str(folder)!r}, which has no settings, metrics or generations.{hint}")
    return run


@dataclass(frozen=True)
class FinishedRun:
    """The results in a run's folder, from `read_run`. Each part is read when first asked for."""

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings: of `config.yaml`, which the command line writes, or else of the logger's `hparams.yaml`.

        Raises:
            SettingsError: If the file cannot be read.
        """
        for name in ("config.yaml", "hparams.yaml"):
            path = self.folder / name
            if path.is_file():
                with _readable(path):
                    settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
                    if not isinstance(settings, dict):
                        raise TypeError(f"it holds {shorten(settings)}, expected names and values")
                    return settings
        return {}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """All metrics that were logged, a column each, by optimizer step; NaN at steps where one was not logged.

        Read from the files of CSV's, TensorBoard's and MLflow's loggers. Where a run has continued at an earlier step,
        the later numbers count.

        Raises:
            SettingsError: If the run had no logger, or one whose files cannot be read here.
        """
        files = _metric_files(self.folder)
        if not files:
            raise SettingsError(f"{self.folder} has no metrics that can be read. {_why_no_metrics(self.folder)}")
        if files[0].suffix == ".csv":
            return _read_csv(files)
        points = _read_events(self.folder) if files[0].name.startswith("events.") else _read_mlflow(self.folder)
        table = pd.DataFrame(points, columns=["step", "name", "value"])
        table = table.drop_duplicates(["step", "name"], keep="last").pivot_table("value", "step", "name", sort=True)
        return table.rename_axis(columns=None)

    @cached_property
    def generation_steps(self) -> list[int]:
        """The optimizer steps at which responses were kept.

        A run that has gone back to an earlier checkpoint has those of its first course, too: nothing that is stored
        tells them apart for certain.
        """
        names = [
            re.fullmatch(r"step_(\d+)\.jsonl", path.name) for path in (self.folder / "generations").glob("*.jsonl")
        ]
        return sorted(int(name[1]) for name in names if name)

    def records(self, step: int | None = None) -> list[GenerationRecord]:
        """The responses at a step, with all of their tokens.

        Args:
            step: One of `generation_steps`. None: the last of them.

        Raises:
            SettingsError: If there are none of that step, or their file cannot be read.
        """
        if step is None and self.generation_steps:
            step = self.generation_steps[-1]
        if step not in self.generation_steps:
            known = ", ".join(map(str, self.generation_steps)) or "none"
            raise SettingsError(f"{self.folder} has no generations of step {step}; the steps that have some: {known}.")
        path = self.folder / "generations" / f"step_{step}.jsonl"
        with _readable(path):
            text = path.read_text(encoding="utf-8")
        return parse_records(text, str(path))

    @cached_property
    def generations(self) -> pd.DataFrame:
        """The responses of all steps, one a row, but for what is known of single tokens.

        The index is the optimizer step, the prompt's number and the sample's.
        """
        rows = []
        for step in self.generation_steps:
            for record in self.records(step):
                fields = {name: value for name, value in vars(record).items() if name not in _NO_COLUMNS}
                rows.append({"step": step, **fields})
        columns = ["step", *(name for name in GenerationRecord.__dataclass_fields__ if name not in _NO_COLUMNS)]
        return pd.DataFrame(rows, columns=columns).set_index(["step", "index", "sample"])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file that cannot be read: one of a run that was killed may be empty, or cut short."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} cannot be read: {one_line(error)}") from error


def _metric_files(folder: Path) -> list[Path]:
    """Files with metrics, those of one logger."""
    numbered = ((re.fullmatch(r"metrics_part_(\d+)\.csv", path.name), path) for path in folder.glob("metrics_*.csv"))
    parts = {int(number[1]): path for number, path in numbered if number}  # of a run that has continued
    csv, mlflow = [*(parts[number] for number in sorted(parts)), folder / "metrics.csv"], folder / "metrics"
    if found := [path for path in csv if path.is_file()]:
        return found
    return sorted(folder.glob("events.out.tfevents.*")) or sorted(path for path in mlflow.rglob("*") if path.is_file())


def _read_csv(parts: Sequence[Path]) -> pd.DataFrame:
    """The metrics of all parts of a run: of each metric what came before the step at which a later part has it."""
    columns: dict[str, pd.Series] = {}
    for path in parts:
        with _readable(path):
            table = pd.read_csv(path).groupby("step").last()  # the last that is no NaN
        for name, values in table.items():
            new, earlier = values.dropna(), columns.get(str(name))
            if earlier is not None and len(new):
                new = pd.concat([earlier[earlier.index < new.index[0]], new])
            columns[str(name)] = new if earlier is None or len(new) else earlier
    return pd.DataFrame(columns).sort_index()


def _read_events(folder: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard shows: after a run that continued at an earlier step, only what came later of that step on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # all of them, not a sample
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name != "hp_metric"]
    return [(event.step, name, event.value) for name in names for event in events.Scalars(name)]


def _read_mlflow(folder: Path) -> list[tuple[int, str, float]]:
    """Of MLflow's store of files: one for each metric, with lines of time, value and step."""
    points = []
    for path in _metric_files(folder):
        name = path.relative_to(folder / "metrics").as_posix()
        with _readable(path):
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # a last one without its end is half written
                _, value, step, *_ = line.split()
                points.append((int(step), name, float(value)))
    return points


def _why_no_metrics(folder: Path) -> str:
    way_out = "Give the run a `CSVLogger` or a `TensorBoardLogger`, in addition to others if needed."
    if any((folder.parent.parent / "wandb").glob(f"*-{folder.name}")):
        return f"Weights & Biases has them in its own files: `wandb sync` sends, `wandb.Api` reads them. {way_out}"
    return f"It had no logger, or one that keeps them elsewhere. {way_out}"
