"""What a model made of its prompts: records, what they add up to, and the lines they are kept in."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from lightning_sft.errors import SettingsError, shorten, why_not_written
from lightning_sft.generation.bootstrap import bootstrap_mean

DECIMALS = 4  # of values of single tokens in files
_TEXTS = ("prompt", "response", "stop_reason")
_OF_THE_FILE = ("step", "run")  # stand in a line of a file, but are not of the record
_READ_BACK = ("prompt", "response", "format_reward", "answer_reward", "reward", "token_entropy", "stop_reason")


@dataclass
class GenerationRecord:
    """A prompt and one response of the model to it.

    Args:
        prompt: The text the model was given.
        response: The text it generated, without EOS.
        ground_truth: The reference answer, if there is one.
        format_reward: Whether the response has the expected format. None without ground truth.
        answer_reward: Whether its answer is correct. None without ground truth.
        reward: The total. None without ground truth.
        token_entropy: Mean entropy of the next-token distribution over the response, in nats.
        response_length: Tokens generated, EOS included.
        stop_reason: `eos`, `stop` (a stop string), `length` (also if the prompt leaves no room for a response), or
            `empty prompt` (without a single token there is nothing to continue).
        reward_error: The error of the reward function, or that it took too long; the rewards then count as 0.
        index: Number of the prompt, from 0.
        sample: Number of the response among those to the same prompt, from 0.
        token_ids: The response's tokens, EOS included, `response_length` of them.
        tokens: Their texts. Joined they are the response with EOS; if several tokens form one character, only the last
            of them has a text.
        token_log_probs: Log-probability of each token under the model, in nats, at temperature 1.
        token_entropies: Entropy of the distribution at each token, in nats, at temperature 1.
    """

    prompt: str
    response: str
    ground_truth: str | None
    format_reward: float | None
    answer_reward: float | None
    reward: float | None
    token_entropy: float
    response_length: int
    stop_reason: str
    reward_error: str | None = None
    index: int = 0
    sample: int = 0
    token_ids: list[int] = field(default_factory=list, repr=False)
    tokens: list[str] = field(default_factory=list, repr=False)
    token_log_probs: list[float] = field(default_factory=list, repr=False)
    token_entropies: list[float] = field(default_factory=list, repr=False)

    @property
    def is_correct(self) -> bool:
        """Whether the answer's reward is positive."""
        return (self.answer_reward or 0.0) > 0

    def drop_tokens(self) -> None:
        """Free most of the memory."""
        self.token_ids, self.tokens, self.token_log_probs, self.token_entropies = [], [], [], []

    def to_json(self) -> dict[str, Any]:
        """The record's line in a file: values of single tokens to four decimals, None if not finite."""
        numbers = {name: finite(value) for name, value in vars(self).items() if isinstance(value, float)}
        for name in ("token_log_probs", "token_entropies"):
            numbers[name] = finite([round(value, DECIMALS) for value in getattr(self, name)])
        return vars(self) | numbers


def finite(value: Any) -> Any:
    """A value, or each of a list, as JSON can hold it: None in the place of NaN and infinity."""
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarize(records: Sequence[GenerationRecord]) -> dict[str, float]:
    """Averages over records; a mean over nothing is NaN.

    Returns:
        `reward`, `answer_reward`, `format_reward`, `response_length`, `response_length_correct` and
        `response_length_incorrect` (of responses whose `answer_reward` is positive, or not), `response_entropy`
        (nats, mean of the records' means), and `reward_failures`, a count. Where every prompt has n > 1 responses also
        `pass_at_<k>` for k = 1, 2, 4, ... and n: the chance that k of them, drawn without replacement, hold a correct
        one, averaged over the prompts.

    Source: of `pass_at_<k>`, Chen et al. 2021 (arXiv:2107.03374), equation 1.
    """
    scored = [record for record in records if record.answer_reward is not None]
    correct = [record for record in scored if record.is_correct]
    incorrect = [record for record in scored if not record.is_correct]

    def mean(group: Sequence[GenerationRecord], name: str) -> float:
        return sum(getattr(record, name) for record in group) / len(group) if group else math.nan

    return {
        "reward": mean(scored, "reward"),
        "answer_reward": mean(scored, "answer_reward"),
        "format_reward": mean(scored, "format_reward"),
        "response_length": mean(records, "response_length"),
        "response_length_correct": mean(correct, "response_length"),
        "response_length_incorrect": mean(incorrect, "response_length"),
        "response_entropy": mean(records, "token_entropy"),
        "reward_failures": float(sum(record.reward_error is not None for record in records)),
        **_pass_at(scored),
    }


def _pass_at(scored: Sequence[GenerationRecord]) -> dict[str, float]:
    samples = list(_by_prompt(scored).values())
    n = len(samples[0]) if samples else 0
    if n < 2 or any(len(group) != n for group in samples):
        return {}
    num_correct = [sum(record.is_correct for record in group) for group in samples]
    ks = sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})
    return {
        f"pass_at_{k}": sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in num_correct) / len(samples) for k in ks
    }


def _by_prompt(records: Sequence[GenerationRecord]) -> dict[int, list[GenerationRecord]]:
    groups: dict[int, list[GenerationRecord]] = {}
    for record in records:
        groups.setdefault(record.index, []).append(record)
    return groups


def summarize_test(records: Sequence[GenerationRecord]) -> dict[str, float]:
    """What `test` says of its records besides `summarize`.

    Returns:
        `num_responses`; `num_correct`; and `answer_reward_low` and `answer_reward_high`, the bounds of a 95% bootstrap
        interval of the mean `answer_reward`: prompts are drawn with replacement, each with all of its responses. All
        but the first are NaN if no record is scored.
    """
    scored = [record for record in records if record.answer_reward is not None]
    groups = _by_prompt(scored).values()
    low, high = bootstrap_mean([sum(record.answer_reward or 0.0 for record in group) / len(group) for group in groups])
    return {
        "num_responses": float(len(records)),
        "num_correct": float(sum(record.is_correct for record in scored)) if scored else math.nan,
        "answer_reward_low": low,
        "answer_reward_high": high,
    }


def check_path(argument: str, path: Path) -> None:
    """Refuse a path to which no records can be written, now rather than after generating them."""
    if (problem := why_not_written(path.parent)) or path.is_dir():
        raise SettingsError(f"`{argument}` is {str(path)!r}, but {problem or 'that is a folder'}. Give another file.")


def write_records(
    path: Path, records: Sequence[GenerationRecord], mode: Literal["w", "a"] = "w", **fields: object
) -> None:
    """Write one JSON object a line; `fields` come first in each. The folder is made if need be.

    Half of a surrogate pair, which the message of a failed reward may hold, is written as JSON escapes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode, encoding="utf-8", errors="backslashreplace") as file:
        for record in records:
            file.write(json.dumps(fields | record.to_json(), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def parse_records(text: str, source: str) -> list[GenerationRecord]:
    """The records of a file that `predict` or a `GenerationMonitor` has written, or is still writing.

    Args:
        text: All lines of the file. A last one that has no end yet and is no whole record is left out.
        source: What messages call the file.
    """
    *lines, last = text.split("\n")
    records = [_record(line, f"line {number} of {source}") for number, line in enumerate(lines, 1) if line.strip()]
    return [*records, _record(last, f"line {len(lines) + 1} of {source}")] if _is_whole(last) else records


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _record(line: str, location: str) -> GenerationRecord:
    try:
        fields = {name: value for name, value in json.loads(line).items() if name not in _OF_THE_FILE}
        problem = problem_of(fields, _READ_BACK)
        if not problem:
            if fields["token_entropy"] is None:  # it was no finite number
                fields["token_entropy"] = math.nan
            return GenerationRecord(**fields)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error)
    raise SettingsError(f"{location} is not a record of a generation: {problem}.")


def problem_of(fields: Mapping[str, Any], needed: Sequence[str]) -> str:
    """What is wrong with those values of a record that others rely on; empty if nothing is.

    Args:
        fields: Of a line of a file, by the names of `GenerationRecord`.
        needed: The names of those that are relied on: texts and numbers.
    """
    for name in needed:
        if name not in fields:
            return f"no value for `{name}`"
        value = fields[name]
        if name in _TEXTS and not isinstance(value, str):
            return f"`{name}` is {shorten(value)}, expected text"
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if name not in _TEXTS and value is not None and not is_number:
            return f"`{name}` is {shorten(value)}, expected a number or null"
    return ""
