"""Models that no single device can hold: FSDP2 keeps a share of each weight on every device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_sft.errors import SettingsError


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The model's transformer blocks, each of which is sharded by itself.

    Raises:
        SettingsError: If the model does not say what its blocks are.
    """
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise SettingsError(
            f"{type(model).__name__} does not say what its blocks are (`_no_split_modules`), so it cannot be sharded. "
            "Use the strategy `ddp`."
        )
    return blocks


def shard(model: PreTrainedModel, device_type: str, compute_dtype: torch.dtype | None = None) -> None:
    """Shard a model over all processes, each of its transformer blocks by itself.

    A block's weights are gathered when it runs. Embeddings and head stay gathered from the forward to the backward
    pass.

    Args:
        model: The same on every process, or without data (on `meta`).
        device_type: Of the devices: `cuda` or `cpu`.
        compute_dtype: Type in which weights are gathered and matrices multiplied; gradients are then summed in
            float32. None: the type of the weights, for both.

    Raises:
        SettingsError: If the model does not say what its blocks are.
    """
    blocks = transformer_blocks(model)
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy()
    if compute_dtype is not None:
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=precision)


def load_sharded(
    build: Callable[[], PreTrainedModel],
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    adapt: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
) -> PreTrainedModel:
    """Build a model on the first process alone and hand each of the others its share: no other holds a full copy.

    Args:
        build: Loads or initialises the model; called on the first process only, where it stays in main memory.
        device: Of this process.
        compute_dtype: As for `shard`.
        adapt: What `build` does to the model's layers, called with a model without data.

    Raises:
        ValueError: On every process, if `build` raises it.
    """
    whole: PreTrainedModel | None = None
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            whole = build()
            found = [(whole.config, whole.generation_config, whole.dtype)]
        except SettingsError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], SettingsError):
        raise found[0]
    config, generation_config, dtype = found[0]
    with torch.device("meta"):
        model = adapt(AutoModelForCausalLM.from_config(config, dtype=dtype))
    model.generation_config = generation_config
    shard(model, device.type, compute_dtype)
    model.to_empty(device=device)
    model.tie_weights()
    weights = whole.state_dict() if whole is not None else {}
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    buffers = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in model.named_buffers():  # also those that no state dict holds, such as rotary frequencies
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    return model


def is_sharded(module: nn.Module) -> bool:
    """Whether processes have to run the module together."""
    return any(isinstance(each, FSDPModule) for each in module.modules())


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether backward passes exchange gradients between processes."""
    if enabled:
        yield
    elif isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        sharded = [each for each in module.modules() if isinstance(each, FSDPModule)]
        for each in sharded:
            each.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for each in sharded:
                each.set_requires_gradient_sync(True, recurse=False)
