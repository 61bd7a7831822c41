"""What a model has said best, as rows to learn from: expert iteration, rejection sampling."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sft.checks import check_integer, check_number, check_type
from lightning_sft.data.rows.files import find_files, unreadable
from lightning_sft.data.rows.readers import UnreadableRow, read_file
from lightning_sft.errors import SettingsError, SettingsTypeError, counted, shorten
from lightning_sft.generation.records import GenerationRecord, problem_of

_ENDED = ("eos", "stop")  # why a response stopped, if it was not cut off
_NEEDED = ("prompt", "response", "reward", "stop_reason")


@dataclass(frozen=True)
class ChosenResponses:
    """Responses chosen as training rows.

    Attributes:
        rows: Rows for `train_data`, with `prompt`, `output`, `ground_truth` and `reward`.
        num_records: Number of records that they were chosen from.
        num_rewarded: Number of these with enough reward that are not truncated.
        num_different: Number of these that differ in prompt or response.
        num_prompts: Number of different prompts in the records.
    """

    rows: list[dict[str, Any]]
    num_records: int
    num_rewarded: int
    num_different: int
    num_prompts: int

    def __str__(self) -> str:
        of_prompts = len({row["prompt"] for row in self.rows})
        return (
            f"{counted(self.num_records, 'response')}: {self.num_rewarded:,} with enough reward, "
            f"{self.num_different:,} of them different; {len(self.rows):,} chosen, to {of_prompts:,} of "
            f"{counted(self.num_prompts, 'prompt')}."
        )


def best_responses(
    records: str | Path | Sequence[str] | Sequence[GenerationRecord], per_prompt: int = 1, min_reward: float = 1.0
) -> list[dict[str, Any]]:
    """Choose a model's best responses as rows to train it on: expert iteration (STaR, ReST), rejection sampling.

    For each prompt the responses with the highest reward are chosen, the first ones among equals, without duplicates
    and without truncated responses. The same records give the same rows, whatever devices wrote them.

    Args:
        records: What `predict` writes: a file, a glob pattern or a list of these; or what `log_generations` returns.
        per_prompt: Maximum number of responses per prompt.
        min_reward: Minimum reward of a response.

    Returns:
        Rows for `train_data`, in the order of the prompts: `prompt`; `output`, the response with the token that ended
        it; `ground_truth`; and `reward`. If a chat template formatted the prompts, and ends turns with another token
        than EOS, train with `append_eos=False`.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        MissingFileError: If there is no such file.
        SettingsError: If a file cannot be read or holds something else; or no response has a reward.
    """
    return choose_responses(records, per_prompt, min_reward).rows


def choose_responses(
    records: str | Path | Sequence[str] | Sequence[GenerationRecord], per_prompt: int, min_reward: float
) -> ChosenResponses:
    """As `best_responses`, with what became of the others."""
    check_integer("per_prompt", per_prompt, at_least=1)
    check_number("min_reward", min_reward, "a number")
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    num_records = num_scored = num_rewarded = 0
    for record in _read(records):
        num_records += 1
        different = by_prompt.setdefault(record["prompt"], {})
        num_scored += record["reward"] is not None
        # So written, a reward of NaN is not enough.
        if record["reward"] is None or not record["reward"] >= min_reward or record["stop_reason"] not in _ENDED:
            continue
        num_rewarded += 1
        row = _row(record)
        different.setdefault(row["output"], row)
    if not num_scored:
        raise SettingsError(
            f"`records` has {counted(num_records, 'response')}, none of them with a reward. Rows whose prompts are "
            "answered need a ground truth."
        )
    # Sorting keeps the order of what is equal.
    chosen = [sorted(rows.values(), key=lambda row: -row["reward"])[:per_prompt] for rows in by_prompt.values()]
    return ChosenResponses(
        [row for rows in chosen for row in rows],
        num_records,
        num_rewarded,
        sum(map(len, by_prompt.values())),
        len(by_prompt),
    )


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    ending = record["tokens"][-1] if record["stop_reason"] == "eos" and record.get("tokens") else ""
    return {
        "prompt": record["prompt"],
        "output": record["response"] + ending,
        "ground_truth": record.get("ground_truth"),
        "reward": record["reward"],
    }


def _read(records: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(records, str | Path):
        records = [str(records)]
    check_type("records", records, (list, tuple), "a file, a pattern, a list of these, or a list of records")
    items: Iterable[object] = records  # type: ignore[assignment]
    for item in items:
        if isinstance(item, GenerationRecord):
            yield vars(item)
        elif isinstance(item, str | Path):
            if not (paths := find_files(str(item), "records")):
                raise SettingsError(f"`records` is {str(item)!r}, expected a file that `predict` has written.")
            for path in paths:
                yield from _read_file(path)
        else:
            raise SettingsTypeError(
                f"`records` has {shorten(item)} of type {type(item).__name__}, expected only files or only records."
            )


def _read_file(path: str) -> Iterator[Mapping[str, Any]]:
    for location, row in _read_rows(path):
        if isinstance(row, UnreadableRow):
            raise SettingsError(f"{location} of {path}: {row.problem}")
        if problem := problem_of(row, _NEEDED):
            raise SettingsError(f"{location} of {path} is not a record of `predict`: {problem}.")
        yield row


def _read_rows(path: str) -> Iterator[tuple[str, dict[str, Any] | UnreadableRow]]:
    try:
        yield from read_file(path)
    except Exception as error:
        raise unreadable("records", path, error) from error
