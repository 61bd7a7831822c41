"""The gradients of an optimizer step: from backward passes through its microbatches, unscaled, and clipped."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer import call
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.tokens.microbatch import Microbatch
from lightning_sft.model.embedding_noise import NoisyRows
from lightning_sft.model.head import ResponseScores
from lightning_sft.model.sharding import gradient_sync, is_sharded, reshard
from lightning_sft.training.objective import Objective
from lightning_sft.training.out_of_memory import naming_way_out
from lightning_sft.training.router_balance import RouterBalance
from lightning_sft.training.scoring import check_batch, score_microbatch


@dataclass(frozen=True)
class StepSums:
    """Numbers of an optimizer step over all devices, float64.

    Attributes:
        loss: The loss, a scalar, with that of routing in it.
        token_entropy: Summed over the response tokens, in nats, a scalar.
        router_loss: The router loss, a scalar; None where there is none.
    """

    loss: Tensor
    token_entropy: Tensor
    router_loss: Tensor | None


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Draw what is random in an optimizer step from these three numbers, whatever was drawn before it."""
    seeds = np.random.SeedSequence((seed, step, rank))
    torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def accumulate_gradients(
    module: L.LightningModule,
    model: PreTrainedModel,
    step: OptimizerStep,
    objective: Objective,
    sync_every_microbatch: bool | None,
) -> StepSums:
    """Make the gradients of an optimizer step's loss, in the place of those of the step before.

    `step` has this device's microbatches, and the totals of all devices. `sync_every_microbatch` says whether devices
    exchange gradients after each microbatch; None: if the model is sharded.
    """
    check_batch(step)
    # Generating leaves some of a sharded model's weights whole; clearing their gradients would not clear the shards'.
    reshard(model)
    for call_hooks in (call._call_callback_hooks, call._call_lightning_module_hook):  # not so by manual optimization
        call_hooks(module.trainer, "on_before_zero_grad", module.optimizers(use_pl_optimizer=False))
    module.zero_grad()  # also of parameters that a subclass's optimizer does not have
    sums = torch.zeros(3, dtype=torch.float64, device=module.device)
    num_devices = module.trainer.world_size
    # Strategies average gradients over devices, but the loss is a sum over them.
    divisor = objective.scale.divisor(step.totals.num_response_tokens, step.totals.num_sequences) / num_devices
    every = is_sharded(model) if sync_every_microbatch is None else sync_every_microbatch

    def score(microbatch: Microbatch) -> ResponseScores:
        is_packed = microbatch.packing is not None
        with objective.noise.on(NoisyRows(microbatch.locations, microbatch.lengths, is_packed, module.global_step)):
            return score_microbatch(model, microbatch, normalize_constant=divisor, token_loss=objective.token_loss)

    balance = RouterBalance(score, step, objective.router_coefficient) if objective.router_coefficient else None
    for index, microbatch in enumerate(step.microbatches):
        last = index == len(step.microbatches) - 1
        sync = gradient_sync(cast(nn.Module, module.trainer.strategy.model), enabled=every or last)
        with sync, naming_way_out(module.trainer, step):
            scores = score(microbatch)
            assert scores.loss is not None  # `normalize_constant` asks for it
            loss = scores.loss
            if balance is not None:
                router_loss = balance.loss(scores, microbatch)
                loss = loss + num_devices * router_loss
                sums[2] += router_loss.detach()
            module.manual_backward(loss)
        sums[0] += loss.detach() / num_devices
        sums[1] += scores.token_entropy.sum()
    if num_devices > 1:
        dist.all_reduce(sums)  # Lightning's `reduce` would wait for all devices first
    return StepSums(sums[0], sums[1], sums[2] if objective.router_coefficient else None)


def unscale(trainer: L.Trainer, optimizer: Optimizer) -> bool:
    """Divide gradients by the scale of `16-mixed`; Lightning leaves that to fused optimizers: too late for clipping.

    Returns:
        Whether there is a scale. Where gradients overflow float16 it is lowered, and the optimizer does not step.
    """
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
    return scaler is not None


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients, whole or sharded, down to a total norm, if there is one; return the norm before, a scalar."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole
