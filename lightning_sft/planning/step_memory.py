"""How much memory of a device an optimizer step takes, found out without having that memory.

The whole step is run - model, head, backward pass, clipping, the user's optimizer - on tensors that have shapes and
types but no values. What each would take is counted from its creation until it is freed.
"""

import copy
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_sft.data.steps.plan import MicrobatchShape
from lightning_sft.data.tokens.collation import collate
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.microbatch import Layout, Microbatch
from lightning_sft.errors import SettingsError, one_line
from lightning_sft.model.attention import VARLEN, packed_inputs
from lightning_sft.model.checkpointing import ActivationCheckpointing
from lightning_sft.model.linear_head import configured_transform
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.precision import FLOAT32, Precision
from lightning_sft.model.sharding import transformer_blocks
from lightning_sft.model.tiles import Tiling, score_tile
from lightning_sft.model.token_loss import NLL, TokenLoss
from lightning_sft.planning.live_bytes import LiveBytes
from lightning_sft.training.state_memory import OptimizerFactory, StateMemory, state_memory, state_tensors, storage_size

# Causal attention without a mask: `transformers` builds one of `length ** 2` for tensors without values.
_UNMASKED = "lightning_sft_unmasked"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(_UNMASKED, lambda *_, **__: None)


@dataclass(frozen=True)
class Devices:
    """The devices of a run, as far as the memory of each depends on them.

    Attributes:
        on_cuda: Whether they are CUDA devices: the head's tiles are larger there, and attention has a kernel for half
            precision.
        num_copies: Devices that each hold the whole model (`ddp`).
        num_shards: Devices that the model is sharded over.
        whole_gradients: Whether each of these keeps gradients of the whole model from microbatch to microbatch, rather
            than exchanging them after each.
    """

    on_cuda: bool = False
    num_copies: int = 1
    num_shards: int = 1
    whole_gradients: bool = False


ONE_CPU = Devices()


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one optimizer step on one device.

    Attributes:
        state: What is kept from step to step; of a sharded model this device's shard.
        gathered: Of a sharded model the whole weights and gradients that exist beside the shard; under `ddp` the
            buffers that gradients are exchanged in.
        activations: What a microbatch's forward pass leaves for its backward pass.
        peak: The most that exists at one time, everything included.
    """

    state: StateMemory
    gathered: int
    activations: int
    peak: int


def step_memory(
    model: PreTrainedModel,
    optimizer: OptimizerFactory,
    shape: MicrobatchShape,
    layout: Layout = "packed",
    *,
    devices: Devices = ONE_CPU,
    precision: Precision = FLOAT32,
    gradient_checkpointing: bool | int = False,
    token_loss: TokenLoss = NLL,
    saved_by_quantization: int = 0,
) -> StepMemory:
    """The most that exists at one time in an optimizer step, once the optimizer has made its state.

    Not counted: what a kernel uses inside, what the allocator loses between blocks, the CUDA context; `compile` is not
    considered. What a sharded model holds is computed rather than run: its shard, two gathered blocks, the gradients of
    one in transit, and whole embeddings and head with their gradients, beside the measured activations.

    Args:
        model: On the device `meta`; it is left alone. `requires_grad` says what is trained.
        optimizer: Makes the optimizer of the parameters.
        shape: Of the step's microbatches. From the second on the gradients of those before exist.
        layout: Of the microbatches.
        devices: Of the run.
        precision: Of the trainer.
        gradient_checkpointing: Which blocks' activations are computed again, see `ActivationCheckpointing`.
        token_loss: What each token adds to the loss.
        saved_by_quantization: Bytes that the weights take less than the model's; none that is sharded is quantised.
    """
    with torch.device("meta"):
        model = copy.deepcopy(model)
    convert(model, precision.stored)
    state = state_memory(model.parameters(), optimizer)
    gathered = state.gradients if devices.num_copies > 1 else 0
    if devices.num_shards > 1:
        convert(model, precision.autocast)
        gathered = _gathered(model) + (state.gradients if devices.whole_gradients else 0)
        state = state.shard(devices.num_shards)
    microbatch = _microbatch(shape, layout)
    _prepare(model, gradient_checkpointing, plain_attention=devices.on_cuda or layout == "padded")
    made = None if state.optimizer is None else _make_optimizer(model, optimizer, devices.on_cuda)
    counted = LiveBytes()
    with torch.autocast("cpu", precision.autocast, enabled=precision.autocast is not None):
        try:
            activations = _run_step(
                model, made, [microbatch] * min(shape.num_microbatches, 2), token_loss, counted, devices
            )
        except (RuntimeError, NotImplementedError) as error:  # it reads values, such as which expert is for a token
            raise SettingsError(
                f"The memory of {type(model).__name__} under {precision} cannot be found out without running it: "
                f"{one_line(error, 200)}"
            ) from error
    # What was run is not sharded: of that, only what is transient counts.
    peak = counted.peak + gathered if devices.num_shards == 1 else state.total + gathered + counted.transient_peak
    state = replace(state, weights=state.weights - saved_by_quantization)
    return StepMemory(state, gathered, activations, peak - saved_by_quantization)


def convert(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give all weights a type, if there is one to give."""
    if dtype is not None:
        model.to(dtype=dtype)


def _gathered(model: PreTrainedModel) -> int:
    """What FSDP2 holds beside the shard: whole embeddings and head with gradients, two blocks, a block's gradients."""
    blocks = transformer_blocks(model)
    sizes = [sum(map(storage_size, block.parameters())) for block in blocks]
    within = {weight for block in blocks for weight in block.parameters()}
    outside = [weight for weight in model.parameters() if weight not in within]
    root = sum(storage_size(weight) * (1 + weight.requires_grad) for weight in outside)
    # A block's gradients exist as they come and as they are summed, in float32.
    reduced = max(
        sum(storage_size(weight) + 4 * weight.numel() for weight in block.parameters() if weight.requires_grad)
        for block in blocks
    )
    return root + 2 * max(sizes) + reduced


def _microbatch(shape: MicrobatchShape, layout: Layout) -> Microbatch:
    """A microbatch of this shape; which tokens it has plays no part."""
    examples = [
        Example(input_ids=[0] * (length + 1), num_prompt_tokens=length + 1 - response)
        for length, response in zip(shape.lengths, shape.num_response_tokens, strict=True)
    ]
    return collate(examples, layout)


def _prepare(model: PreTrainedModel, gradient_checkpointing: bool | int, plain_attention: bool) -> None:
    """Put tensors without values in the place of those on `meta`, which no kernel of a device would take."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model.to_empty(device="cpu")
    model.tie_weights()
    model.train()
    ActivationCheckpointing(gradient_checkpointing).enable(model)
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(_UNMASKED if plain_attention else VARLEN)


def _make_optimizer(model: PreTrainedModel, factory: OptimizerFactory, on_cuda: bool) -> Optimizer:
    optimizer = factory([parameter for parameter in model.parameters() if parameter.requires_grad])
    for group in optimizer.param_groups if on_cuda else ():  # what torch chooses by default there
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def _run_step(
    model: PreTrainedModel,
    optimizer: Optimizer | None,
    microbatches: list[Microbatch],
    token_loss: TokenLoss,
    counted: LiveBytes,
    devices: Devices,
) -> int:
    """One optimizer step as in `SFTModule.training_step`; returns the bytes that the first forward pass leaves."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counted.keep(model.parameters())
    if optimizer is not None:  # its first step makes its state
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        counted.keep(tensor for state in optimizer.state.values() for tensor in state_tensors(state))
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda parameter: counted.keep([cast(Tensor, parameter.grad)]))
    activations = None
    with counted:
        for microbatch in microbatches:
            before = counted.transient
            loss = _loss(model, microbatch, token_loss, counted, devices.on_cuda)
            if activations is None:
                activations = counted.transient - before
            # Not one: on CUDA the head multiplies its gradients by whatever comes, on CPU only if it is not one.
            loss.backward(torch.full((), 0.5 if devices.on_cuda else 1.0, dtype=loss.dtype))
            del loss
        nn.utils.clip_grad_norm_(trained, 1.0)
        if optimizer is not None:
            optimizer.step()
    return activations or 0


def _loss(
    model: PreTrainedModel, microbatch: Microbatch, token_loss: TokenLoss, counted: LiveBytes, on_cuda: bool
) -> Tensor:
    scores = score_responses(
        model,
        microbatch.input_ids,
        microbatch.labels,
        microbatch.response_positions,
        normalize_constant=1.0,
        token_loss=token_loss,
        tiling=Tiling.for_device("cuda", counted.as_one_kernel(score_tile)) if on_cuda else None,
        transform=configured_transform(model),  # which cannot be tried out without values
        **packed_inputs(model, microbatch.model_inputs()),
    )
    return cast(Tensor, scores.loss)
