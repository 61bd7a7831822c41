"""What an optimizer step needs of a device's memory, found out without that memory.

The step is run as it is - model, head, backward pass, clipping, the user's optimizer - on tensors that have shapes and
types but no values, and every storage is counted from its first use until it is freed.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_sft.data.collation import collate
from lightning_sft.data.example import Example
from lightning_sft.data.microbatch import Microbatch
from lightning_sft.data.plan import Layout
from lightning_sft.errors import SettingsError, one_line
from lightning_sft.model.attention import VARLEN, packed_inputs
from lightning_sft.model.linear_head import configured_transform
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.precision import FLOAT32, Precision
from lightning_sft.model.pretrained import enable_gradient_checkpointing
from lightning_sft.model.sharding import transformer_blocks
from lightning_sft.model.tiles import Tiling, score_tile
from lightning_sft.training.module import SFTModule
from lightning_sft.training.state_memory import OptimizerFactory, StateMemory, state_memory, state_tensors, storage_size

# Causal attention without a mask: `transformers` builds one of `length ** 2` for tensors without values.
_UNMASKED = "lightning_sft_unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(_UNMASKED, lambda *_, **__: None)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one optimizer step on one device.

    Attributes:
        state: What is held from step to step; a share of it where the model is sharded.
        gathered: Whole weights and gradients beside the shares, or what `ddp` copies gradients to.
        activations: What a microbatch's forward pass leaves for its backward pass.
        peak: The most that is held at one time, everything included.
    """

    state: StateMemory
    gathered: int
    activations: int
    peak: int


def step_memory(
    model: PreTrainedModel,
    optimizer: OptimizerFactory,
    lengths: Sequence[int],
    num_response_tokens: Sequence[int],
    *,
    layout: Layout = "packed",
    num_microbatches: int = 1,
    precision: Precision = FLOAT32,
    gradient_checkpointing: bool = False,
    on_cuda: bool = False,
    num_copies: int = 1,
    num_shards: int = 1,
    whole_gradients: bool = False,
) -> StepMemory:
    """The most that an optimizer step holds at one time, once the optimizer has made its state.

    Not counted: what a kernel uses inside, what the allocator loses between blocks, the CUDA context; `compile` is not
    considered. Sharded models are computed: shares, two gathered blocks, the gradients of one in transit, and whole
    embeddings and head with their gradients, beside the measured activations.

    Args:
        model: On the device `meta`; it is left alone. `requires_grad` says what is trained.
        optimizer: Makes the optimizer of the parameters.
        lengths: Inputs of each sequence of the microbatch, which is one token less than it has.
        num_response_tokens: Of each sequence.
        layout: Of the microbatch.
        num_microbatches: Of the step; from the second on the gradients of those before are there.
        precision: Of the trainer.
        gradient_checkpointing: Whether activations are computed again.
        on_cuda: Whether tiles are those of CUDA, and attention has a kernel for half precision.
        num_copies: Devices under `ddp`.
        num_shards: Devices that share the model.
        whole_gradients: Whether shards keep the whole gradients between microbatches.

    Raises:
        ValueError: If the model cannot be run without values.
    """
    with torch.device("meta"):
        model = copy.deepcopy(model)
    if precision.stored is not None:
        cast(nn.Module, model).to(dtype=precision.stored)
    state = state_memory(model.parameters(), optimizer)
    gathered = state.gradients if num_copies > 1 else 0  # the reducer's buckets
    if num_shards > 1:
        if precision.autocast is not None:
            cast(nn.Module, model).to(dtype=precision.autocast)
        gathered = _gathered(model) + (state.gradients if whole_gradients else 0)
        state = state.share(num_shards)
    microbatch = _microbatch(lengths, num_response_tokens, layout)
    _prepare(model, gradient_checkpointing, plain_attention=on_cuda or layout == "padded")
    made = None
    if state.optimizer is not None:
        made = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
        for group in made.param_groups if on_cuda else ():  # torch's defaults there
            if group.get("foreach", False) is None and not group.get("fused"):
                group["foreach"] = True
    counted = _LiveBytes()
    with torch.autocast("cpu", precision.autocast, enabled=precision.autocast is not None):
        try:
            activations = _run_step(model, made, microbatch, counted, min(num_microbatches, 2), on_cuda)
        except (RuntimeError, NotImplementedError) as error:  # it reads values, such as which expert is for a token
            raise SettingsError(
                f"The memory of {type(model).__name__} under {precision} cannot be found out without running it: "
                f"{one_line(error, 200)}"
            ) from error
    # With shards what is measured is what there is beside the state, which is then a share.
    peak = counted.peak + gathered if num_shards == 1 else state.total + gathered + counted.peak_beside
    return StepMemory(state, gathered, activations, peak)


def module_step_memory(module: SFTModule, *sequences: Sequence[int], **options: Any) -> StepMemory:
    """What an optimizer step of a module takes of a device.

    Args:
        module: With its settings, and no model yet.
        *sequences: `lengths` and `num_response_tokens` of `step_memory`.
        **options: Its others; by default the module's own settings.
    """
    own = {
        "gradient_checkpointing": module.gradient_checkpointing,
        "whole_gradients": module._sync_every_microbatch is False,
    }
    model = module.empty_model(options.get("precision", FLOAT32))
    return step_memory(model, module._optimizer, *sequences, **(own | options))


def _run_step(
    model: PreTrainedModel,
    optimizer: Optimizer | None,
    microbatch: Microbatch,
    counted: "_LiveBytes",
    num_microbatches: int,
    on_cuda: bool,
) -> int:
    """One optimizer step as in `SFTModule.training_step`; returns what the first forward pass leaves."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counted.hold(model.parameters())
    if optimizer is not None:  # its first step makes its state
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        counted.hold(tensor for state in optimizer.state.values() for tensor in state_tensors(state))
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda parameter: counted.hold([cast(Tensor, parameter.grad)]))
    activations = 0
    tensors = (microbatch.input_ids, microbatch.labels, microbatch.response_positions)
    # A single pass over each tile on CUDA, of which nothing but the results takes memory.
    tiling = Tiling.for_device("cuda", counted.fused(score_tile)) if on_cuda else None
    transform = configured_transform(model)  # which cannot be tried out without values
    with counted:
        for index in range(num_microbatches):
            before = counted.beside
            options = packed_inputs(model, microbatch.model_inputs())
            options |= {"normalize_constant": 1.0, "tiling": tiling, "transform": transform}
            loss = cast(Tensor, score_responses(model, *tensors, **options).loss)
            if index == 0:
                activations = counted.beside - before
            # Not one: on CUDA the head multiplies its gradients by whatever comes, on CPU only if it is not one.
            loss.backward(torch.full((), 0.5 if on_cuda else 1.0, dtype=loss.dtype))
            del loss
        nn.utils.clip_grad_norm_(trained, 1.0)
        if optimizer is not None:
            optimizer.step()
    return activations


class _LiveBytes(TorchDispatchMode):
    """Counts storages from their first use until they are freed; apart: those that are not held from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.beside = self.peak = self.peak_beside = 0
        self._sizes: dict[int, int] = {}
        self._held: set[int] = set()
        self._fused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._fused:
            self._count(result)
        return result

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count these as held from step to step."""
        for tensor in tensors:
            self._count(tensor)
            key = tensor.untyped_storage()._cdata
            if key not in self._held:
                self._held.add(key)
                self.beside -= self._sizes[key]

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a single kernel: nothing but its results is counted."""

        def call(*arguments: Any) -> Any:
            self._fused = True
            result = function(*arguments)
            self._fused = False
            self._count(result)
            return result

        return call

    def _count(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._free, key).atexit = False
            self.live += storage.nbytes()
            self.beside += storage.nbytes()
        self.peak = max(self.peak, self.live)
        self.peak_beside = max(self.peak_beside, self.beside)

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.live -= size
        if key in self._held:
            self._held.remove(key)
        else:
            self.beside -= size


def _gathered(model: PreTrainedModel) -> int:
    """What FSDP2 holds beside the shares: whole embeddings and head with gradients, two blocks, a block's gradients."""
    blocks = transformer_blocks(model)
    sizes = [sum(map(storage_size, block.parameters())) for block in blocks]
    within = {weight for block in blocks for weight in block.parameters()}
    outside = [weight for weight in model.parameters() if weight not in within]
    root = sum(storage_size(weight) * (1 + weight.requires_grad) for weight in outside)
    # A block's gradients are there as they come and as they are summed, in float32.
    reduced = max(
        sum(storage_size(weight) + 4 * weight.numel() for weight in block.parameters() if weight.requires_grad)
        for block in blocks
    )
    return root + 2 * max(sizes) + reduced


def _microbatch(lengths: Sequence[int], num_response_tokens: Sequence[int], layout: Layout) -> Microbatch:
    """A microbatch of sequences of these lengths; which tokens they are of plays no part."""
    examples = [
        Example(input_ids=[0] * (length + 1), num_prompt_tokens=length + 1 - response)
        for length, response in zip(lengths, num_response_tokens, strict=True)
    ]
    return collate(examples, layout)


def _prepare(model: PreTrainedModel, gradient_checkpointing: bool, plain_attention: bool) -> None:
    """Tensors without values in the place of those on `meta`, which no kernel of a device would take."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
    model.tie_weights()
    model.train()
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(_UNMASKED if plain_attention else VARLEN)
