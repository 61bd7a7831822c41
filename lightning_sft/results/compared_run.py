"""`ComparedRun`: what is known of a run that is compared with others, from its folder or from a file of records."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_sft.checks import check_integer, check_type
from lightning_sft.data.rows.files import FileKind
from lightning_sft.errors import MissingFileError, SettingsError, located, one_line, path_from_here
from lightning_sft.generation.records import GenerationRecord, parse_records
from lightning_sft.results.finished_run import FinishedRun, read_run

_EXPECTED = "the folders of at least two runs, or files of records"


@dataclass(frozen=True)
class ComparedRun:
    """A run beside others.

    Args:
        name: What it is called beside the others.
        path: Its folder, or the file of its records.
        records: Its responses; none if it kept none.
        step: The optimizer step that they are of; None if that is not known.
        metrics: Its metrics by optimizer step, a column each; None if there are none that can be read.
        settings: Its settings; none of a file.
        notes: What could not be read, in words.
    """

    name: str
    path: Path
    records: list[GenerationRecord] = field(repr=False)
    step: int | None = None
    metrics: pd.DataFrame | None = field(default=None, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)


def read_compared_runs(runs: Sequence[str | Path], names: Sequence[str] | None, step: int | None) -> list[ComparedRun]:
    """Read the runs that `compare_runs` is to compare, whose arguments these are."""
    check_type("runs", runs, (list, tuple), _EXPECTED)
    for run in runs:
        check_type("runs", run, (str, Path), _EXPECTED)
    check_integer("step", step, at_least=0, optional=True)
    paths = [Path(run).expanduser() for run in runs]
    if len(paths) < 2:
        got = f"only {str(runs[0])!r}" if paths else "empty"
        raise SettingsError(
            f"`runs` is {got}, expected {_EXPECTED}. A step of a run is a file, such as "
            "runs/quickstart/version_0/generations/step_0.jsonl."
        )
    resolved = [path.resolve() for path in paths]
    twice = [str(run) for run, path in zip(runs, resolved, strict=True) if resolved.count(path) > 1]
    if twice:
        raise SettingsError(f"`runs` has {twice[0]!r} twice. Give each run once.")
    if step is not None and not any(path.is_dir() for path in paths):
        raise SettingsError(f"`step` is {step}, but `runs` are files, each of one step. Leave it out, or give folders.")
    chosen = _chosen_names(names, len(paths)) or _names_of(resolved)
    return [_read(path, name, step) for path, name in zip(paths, chosen, strict=True)]


def _chosen_names(names: Sequence[str] | None, number: int) -> list[str]:
    check_type("names", names, (list, tuple), "a name for each run", optional=True)
    for name in names or ():
        check_type("names", name, str, "a name for each run")
    if names is not None and (len(names) != number or len(set(names)) != number or not all(map(str.strip, names))):
        raise SettingsError(f"`names` is {list(names)!r}, expected {number} different names, one for each run.")
    return list(names or ())


def _names_of(paths: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as tell them apart, `.jsonl` left out if it does not take that."""
    bare = [path.with_suffix("") if path.suffix == ".jsonl" else path for path in paths]
    paths = bare if len(set(bare)) == len(bare) else paths
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [Path(*path.parts[-depth:]).as_posix() for path in paths]


def _read(path: Path, name: str, step: int | None) -> ComparedRun:
    if path.is_dir():
        with located("`runs`"):
            return _read_folder(read_run(path), name, step)
    if not path.is_file():
        raise MissingFileError(f"`runs` has {str(path)!r}, but there is no such folder or file.")
    try:
        with FileKind.of(str(path)).open(str(path)) as file:
            text = file.read().decode("utf-8")
    except Exception as error:  # each kind of compression has errors of its own
        raise SettingsError(f"`runs` has {str(path)!r}, which cannot be read: {one_line(error)}") from error
    records = parse_records(text, str(path_from_here(path)))
    if not records:
        raise SettingsError(f"`runs` has {str(path)!r}, which has no records.")
    named = re.fullmatch(r"(?:test_)?step_(\d+)\.jsonl", path.name)
    return ComparedRun(name, path, records, int(named[1]) if named else None)


def _read_folder(run: FinishedRun, name: str, step: int | None) -> ComparedRun:
    notes, records, metrics, settings = [], [], None, {}
    if step is not None or run.generation_steps:
        records = run.records(step)
        step = run.generation_steps[-1] if step is None else step
    try:
        metrics = run.metrics
    except SettingsError as error:
        notes.append(str(error))
    try:
        settings = run.settings
    except SettingsError as error:
        notes.append(str(error))
    if metrics is None and not records:
        raise SettingsError(f"{str(run.folder)!r} has neither generations nor metrics. {' '.join(notes)}")
    return ComparedRun(name, run.folder, records, step, metrics, settings, notes)
