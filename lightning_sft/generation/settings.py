"""How generations are made."""

import math
from dataclasses import dataclass, field

from lightning_sft.checks import check_callable, check_integer, check_number, check_type
from lightning_sft.generation.generators import ResponseGenerator
from lightning_sft.generation.sampling import Sampling
from lightning_sft.rewards.functions import RewardFunction, r1_zero_reward

REWARD_SECONDS = 30.0


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are drawn, how many at a time, and how they are scored: the arguments of `log_generations`."""

    reward_fn: RewardFunction = r1_zero_reward
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens_per_batch: int | None = None
    reward_seconds: float | None = REWARD_SECONDS
    generator: ResponseGenerator | None = None

    def __post_init__(self) -> None:
        check_callable("reward_fn", self.reward_fn, "a function of response and ground truth")
        check_callable("generator", self.generator, "a function of model, requests and sampling", optional=True)
        check_type("sampling", self.sampling, Sampling, "a `Sampling`")
        check_integer("max_tokens_per_batch", self.max_tokens_per_batch, at_least=1, optional=True)
        check_number(
            "reward_seconds",
            self.reward_seconds,
            "a positive number, or none",
            lambda seconds: 0 < seconds < math.inf,
            optional=True,
        )
