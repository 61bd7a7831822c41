"""The prompts that runs have answered, beside one another, and what the runs' rewards differ by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_sft.generation.bootstrap import bootstrap_mean
from lightning_sft.generation.records import GenerationRecord


@dataclass(frozen=True)
class ComparedPrompt:
    """A prompt, and what each run has answered.

    Args:
        prompt: The text.
        ground_truths: The different reference answers that the runs' records have for it, usually one.
        responses: Of each run, in the order of their samples; empty for a run that was not asked.
    """

    prompt: str
    ground_truths: list[str]
    responses: list[list[GenerationRecord]]

    def reward(self, run: int) -> float | None:
        """The mean reward of the responses of a run, by its place among the runs; None if none of them has one."""
        rewards = [record.reward for record in self.responses[run] if record.reward is not None]
        return math.fsum(rewards) / len(rewards) if rewards else None


def match_prompts(runs: Sequence[Sequence[GenerationRecord]]) -> list[ComparedPrompt]:
    """Match the prompts of several runs by their text, given the records of each run.

    Returns:
        Each text once, with all of its samples: first those of the first run in its order, then what only others have.
    """
    found: dict[str, ComparedPrompt] = {}
    for place, records in enumerate(runs):
        for record in sorted(records, key=lambda record: (record.index, record.sample)):
            prompt = found.get(record.prompt)
            if prompt is None:
                prompt = found[record.prompt] = ComparedPrompt(record.prompt, [], [[] for _ in runs])
            prompt.responses[place].append(record)
            if record.ground_truth is not None and record.ground_truth not in prompt.ground_truths:
                prompt.ground_truths.append(record.ground_truth)
    return list(found.values())


@dataclass(frozen=True)
class RewardDifference:
    """By how much a run's reward is above the first run's, over the prompts that both have a reward for.

    Attributes:
        mean: Mean of the differences; of a prompt's samples the mean reward counts. NaN without pairs.
        low: Lower bound of its 95% interval, by the paired bootstrap: prompts are drawn with replacement.
        high: Upper bound.
        num_pairs: Prompts.
        num_better: Prompts at which the run has more reward than the first one.
        num_worse: Prompts at which it has less.
    """

    mean: float
    low: float
    high: float
    num_pairs: int
    num_better: int
    num_worse: int

    def __str__(self) -> str:
        interval = f"{self.mean:+.3f} (95%: {self.low:+.3f} to {self.high:+.3f})" if self.num_pairs else "unknown"
        return f"{interval}, {self.num_pairs:,} pairs, {self.num_better:,} better, {self.num_worse:,} worse"


def reward_difference(prompts: Sequence[ComparedPrompt], run: int) -> RewardDifference:
    """Compare the rewards of a run, by its place among the runs, with those of the first one."""
    rewards = [(prompt.reward(0), prompt.reward(run)) for prompt in prompts]
    differences = np.array([other - first for first, other in rewards if first is not None and other is not None])
    low, high = bootstrap_mean(differences.tolist())
    return RewardDifference(
        mean=float(differences.mean()) if differences.size else math.nan,
        low=low,
        high=high,
        num_pairs=differences.size,
        num_better=int((differences > 0).sum()),
        num_worse=int((differences < 0).sum()),
    )
