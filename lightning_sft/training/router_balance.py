"""The router loss of a whole optimizer step, however it is split over microbatches and devices.

Its gradient needs to know how often each expert is chosen in the whole step before the first backward pass. Where there
are several microbatches, all of them go through the model once more, without gradients, and in any case the devices add
up what they have counted: one exchange of `num_experts + 1` numbers.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.tokens.microbatch import Microbatch
from lightning_sft.model.head import ResponseScores
from lightning_sft.model.routing import RoutingSums

Scorer = Callable[[Microbatch], ResponseScores]


class RouterBalance:
    """The router loss of one optimizer step, times `coefficient`; `score` runs a mixture of experts on a microbatch."""

    def __init__(self, score: Scorer, step: OptimizerStep, coefficient: float) -> None:
        self._coefficient = coefficient
        self._whole: RoutingSums | None = None
        if len(step.microbatches) > 1:  # on all devices alike
            self._whole = _over_devices(_counted_ahead(score, step))

    def loss(self, scores: ResponseScores, microbatch: Microbatch) -> Tensor:
        """What a microbatch contributes; over all microbatches and devices it adds up to the loss of the step."""
        own = _sums(scores, microbatch)
        if self._whole is None:
            self._whole = _over_devices(own)
        return self._coefficient * own.loss(self._whole)


def _sums(scores: ResponseScores, microbatch: Microbatch) -> RoutingSums:
    assert scores.routing is not None  # there is a coefficient
    holds_token = microbatch.holds_token().flatten().to(microbatch.input_ids.device, non_blocking=True)
    return scores.routing.sums(holds_token)


def _counted_ahead(score: Scorer, step: OptimizerStep) -> RoutingSums:
    """Sums over this device's microbatches; random numbers are then drawn once more, so that dropout is the same."""
    device = step.microbatches[0].input_ids.device
    counted = []
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for microbatch in step.microbatches:
            headless = replace(microbatch, response_positions=microbatch.response_positions[:0])
            counted.append(_sums(score(headless), microbatch))
    return RoutingSums(
        *(torch.stack([getattr(each, name) for each in counted]).sum(0) for name in RoutingSums.__dataclass_fields__)
    )


def _over_devices(sums: RoutingSums) -> RoutingSums:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sums
    numbers = torch.cat([sums.chosen, sums.num_tokens.unsqueeze(0)])
    dist.all_reduce(numbers)
    return replace(sums, chosen=numbers[:-1], num_tokens=numbers[-1])
