"""Models that are too large for one device: FSDP2 keeps a share of each weight on every device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_sft.errors import SettingsError, counted
from lightning_sft.model.blocks import find_blocks

_T = TypeVar("_T")


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's transformer blocks, each to be sharded by itself; refused if unknown, or if they share weights."""
    blocks = find_blocks(model)
    if not blocks:
        raise SettingsError(
            f"{type(model).__name__} does not say what its blocks are (`_no_split_modules`), so it cannot be sharded. "
            "Use the strategy `ddp`."
        )
    weights = [weight for block in blocks for weight in block.parameters()]
    if len(set(weights)) < len(weights):
        raise SettingsError(
            f"Blocks of {type(model).__name__} share weights, so they cannot be sharded one by one. Use the strategy "
            "`ddp`."
        )
    return blocks


def shards_per_replica(num_devices: int, num_replicas: int) -> int:
    """How many of all devices hold a model between them, if there are so many groups that each hold it whole."""
    if num_replicas > 1 and (num_devices % num_replicas or num_devices == num_replicas):
        raise SettingsError(
            f"`num_replicas` is {num_replicas}, but {counted(num_devices, 'device')} cannot be divided into so many "
            "groups of two or more. Give a divisor of their number; or `trainer.strategy` 'ddp', where each holds the "
            "whole model."
        )
    return num_devices // num_replicas


def check_not_replicated(num_replicas: int) -> None:
    """Refuse groups of devices that share a model where each device holds all of it."""
    if num_replicas > 1:
        raise SettingsError(
            f"`num_replicas` is {num_replicas}, but the model is not sharded. Leave it out, or set `trainer.strategy` "
            "to `ModelParallelStrategy` (`--config fsdp`)."
        )


@dataclass(frozen=True)
class Sharding:
    """How a model is shared among processes.

    Attributes:
        device_type: Of the devices: `cuda` or `cpu`.
        compute_dtype: Type in which weights are gathered and matrices multiplied; gradients are then summed in
            float32. None: the type of the weights, for both.
        num_replicas: Groups of processes of which each holds the whole model (HSDP).
    """

    device_type: str
    compute_dtype: torch.dtype | None = None
    num_replicas: int = 1

    def mesh(self) -> DeviceMesh:
        """All processes; replicas times shards if there are several replicas."""
        num_processes, num_replicas = dist.get_world_size(), self.num_replicas
        num_shards = shards_per_replica(num_processes, num_replicas)
        if num_replicas == 1:
            return init_device_mesh(self.device_type, (num_processes,))
        return init_device_mesh(self.device_type, (num_replicas, num_shards), mesh_dim_names=("replicate", "shard"))


def shard(model: PreTrainedModel, sharding: Sharding) -> None:
    """Shard a model over all processes, each of its transformer blocks by itself.

    A block's weights are gathered while the block before it runs. Embeddings and head stay gathered from the forward to
    the backward pass. The model is the same on every process, or without data (on `meta`).
    """
    blocks, mesh = transformer_blocks(model), sharding.mesh()
    precision = MixedPrecisionPolicy()
    if sharding.compute_dtype is not None:
        precision = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32)
    sharded = [fully_shard(module, mesh=mesh, mp_policy=precision) for module in (*blocks, model)]
    # Forward, torch gathers a block only once the process has come to it, too late where that waits for the device, as
    # a router of experts does, or is behind it. Backward, torch gathers the next block ahead by itself.
    for module, following in pairwise((sharded[-1], *sharded[:-1])):
        module.set_modules_to_forward_prefetch([following])


def load_sharded(
    build: Callable[[], PreTrainedModel],
    device: torch.device,
    sharding: Sharding,
    adapt: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
) -> PreTrainedModel:
    """Build a model on the first process alone, and give every process its share of the weights.

    Args:
        build: Loads or initialises the model; called on the first process only, where it stays in main memory. If it
            raises a `SettingsError`, every process does.
        device: Of this process.
        sharding: How it is shared.
        adapt: Changes the layers of a model without data as `build` changes those of the model.
    """
    whole: PreTrainedModel | None = None
    facts: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            whole = build()
            facts = [(whole.config, whole.generation_config, whole.dtype)]
        except SettingsError as error:
            facts = [error]
    dist.broadcast_object_list(facts, src=0)
    if isinstance(facts[0], SettingsError):
        raise facts[0]
    config, generation_config, dtype = facts[0]
    with torch.device("meta"):
        model = adapt(AutoModelForCausalLM.from_config(config, dtype=dtype))
    model.generation_config = generation_config
    shard(model, sharding)
    model.to_empty(device=device)
    model.tie_weights()
    weights, buffers = ({}, {}) if whole is None else (whole.state_dict(), dict(whole.named_buffers()))
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # also those that no state dict holds, such as rotary frequencies
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    return model


def gathered(value: _T, num_processes: int) -> list[_T]:
    """The values of all processes, by rank; each has to call this."""
    values = [value] * num_processes
    if num_processes > 1:
        dist.all_gather_object(values, value)
    return values


def _sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [each for each in module.modules() if isinstance(each, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a share of the weights only, so that all have to run the module together."""
    return bool(_sharded_parts(module))


def reshard(module: nn.Module) -> None:
    """Have a sharded module that has run let go of whole weights.

    What is then done to its parameters, such as freezing some or clearing gradients, is done to those that are trained.
    """
    for part in _sharded_parts(module):
        part.reshard()


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """A context in which backward passes exchange gradients between processes, or do not.

    `module` is what is trained, as the strategy has wrapped it; refused if its strategy cannot go without.
    """
    if enabled:
        yield
    elif isinstance(module, DistributedDataParallel):
        if module.static_graph:  # torch would fail on an assertion of its own
            raise SettingsError(
                "`trainer.strategy` has `static_graph`, under which each backward pass exchanges gradients. Set "
                "`model.sync_every_microbatch` to true, or leave `static_graph` out."
            )
        with module.no_sync():
            yield
    else:
        for part in _sharded_parts(module):
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in _sharded_parts(module):
                part.set_requires_gradient_sync(True, recurse=False)
