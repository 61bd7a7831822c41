"""What happens to a model between its source and the first optimizer step."""

from dataclasses import dataclass, replace
from typing import cast

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from lightning_sft.errors import SettingsError
from lightning_sft.loops.trainer_state import leave_inference_mode
from lightning_sft.model.blocks import compile_blocks
from lightning_sft.model.builder import ModelBuilder
from lightning_sft.model.causality import check_causal
from lightning_sft.model.checkpointing import ActivationCheckpointing
from lightning_sft.model.linear_head import find_linear_head
from lightning_sft.model.packing import enable_packing
from lightning_sft.model.positions import num_positions
from lightning_sft.model.precision import Precision
from lightning_sft.model.quantization import check_quantized, is_quantized
from lightning_sft.model.rotary import keep_rotary_by_row
from lightning_sft.model.router_loss import router_coefficient
from lightning_sft.model.sharding import Sharding, check_not_replicated, is_sharded, load_sharded, reshard, shard
from lightning_sft.training.checkpoint_files import use_own_files
from lightning_sft.training.checkpoint_weights import InitialWeights
from lightning_sft.training.trainer_checks import check_trainer


@dataclass(frozen=True)
class ModelTraits:
    """What was found out about a model by running it.

    Attributes:
        why_not_packed: Why it cannot take packed batches; None if it can.
        num_positions: Inputs that a row may have at the most. None: any number.
        router_coefficient: What the router loss is multiplied by; 0 unless the configuration asks for it.
    """

    why_not_packed: str | None
    num_positions: int | None
    router_coefficient: float


def load_model(
    builder: ModelBuilder,
    loaded: PreTrainedModel | None,
    trainer: L.Trainer | None,
    initial: InitialWeights | None,
    num_replicas: int,
) -> PreTrainedModel:
    """The model with its adapters; sharded over all devices if the trainer's strategy asks for that.

    A model that is loaded already is adapted and sharded in place. `initial` are weights to begin with, instead of
    those that the builder finds or draws.
    """
    if trainer is not None:
        check_trainer(trainer)
        use_own_files(trainer)
    precision, strategy = _precision_of(trainer), getattr(trainer, "strategy", None)

    def build() -> PreTrainedModel:
        model = stored(builder.build(precision) if loaded is None else builder.adapt(loaded))
        if initial is not None:
            initial.give_to(model, builder)
        return model

    def stored(model: PreTrainedModel) -> PreTrainedModel:
        return _store_as(precision.stored, model)

    if not isinstance(strategy, ModelParallelStrategy):
        if trainer is not None and trainer.state.fn == "fit":
            check_not_replicated(num_replicas)
        return build()
    leave_inference_mode(cast(L.Trainer, trainer))
    _check_mesh(strategy)
    device = strategy.root_device
    sharding = Sharding(device.type, precision.autocast, num_replicas)
    if loaded is None:
        return load_sharded(build, device, sharding, adapt=lambda model: stored(builder.adapt(model)))
    if not is_sharded(loaded):
        shard(build(), sharding)
    return loaded


def _store_as(dtype: torch.dtype | None, model: PreTrainedModel) -> PreTrainedModel:
    """Convert all weights, and leave buffers alone, such as rotary frequencies.

    Lightning does that too late: a checkpoint's float64 weights would be read into a float32 model first, and FSDP2
    goes on to gather weights in the type that they had when the model ran for the first time.
    """
    for weight in model.parameters() if dtype is not None else ():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return model


def _check_mesh(strategy: ModelParallelStrategy) -> None:
    sizes = strategy.device_mesh["data_parallel"].size(), strategy.device_mesh["tensor_parallel"].size()
    if sizes != (strategy.num_nodes, strategy.num_processes):
        raise SettingsError(
            f"`trainer.strategy` has `data_parallel_size` {sizes[0]} and `tensor_parallel_size` {sizes[1]}, but tensor "
            "parallelism is not supported: the model is sharded over all devices. Leave both at 'auto'; "
            "`model.num_replicas` says how many groups of devices each hold the whole model."
        )


def _check_model(model: PreTrainedModel, trains_adapters: bool, trainer: L.Trainer | None) -> None:
    """Refuse a model that cannot be trained, or with fewer embeddings than the datamodule's tokenizer has tokens."""
    if is_quantized(model):
        check_quantized(trains_adapters, is_sharded(model))
    fits = trainer is not None and trainer.state.fn == "fit"
    if fits and not any(weight.requires_grad for weight in model.parameters()):
        raise SettingsError(
            "`model` has no weight that is to be trained: all are frozen. Set `requires_grad` of some, or train `lora` "
            "adapters."
        )
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    num_embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if tokenizer is not None and len(tokenizer) > num_embeddings:
        raise SettingsError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model only {num_embeddings} embeddings. "
            "Use the model's own tokenizer, or call `model.resize_token_embeddings` first."
        )


def _warn_of_half_precision(model: PreTrainedModel, builder: ModelBuilder, trainer: L.Trainer | None) -> None:
    """A given model may be in half precision unasked: `from_pretrained` loads weights in the type of their file."""
    if trainer is None or trainer.state.fn != "fit" or not isinstance(builder.source, PreTrainedModel):
        return
    trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
    half = next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in trained), None)
    if half is not None and _precision_of(trainer).stored is None:
        rank_zero_warn(
            f"The weights of `model` are trained in {half}, which rounds small steps away, such as most at a learning "
            "rate of 1e-5. Load it with `dtype=torch.float32`, or give its name (`precision='bf16-mixed'` of the "
            "trainer is as fast). If half precision is meant, set `precision` to 'bf16-true'."
        )


def prepare_model(
    model: PreTrainedModel,
    trainer: L.Trainer | None,
    builder: ModelBuilder,
    checkpointing: ActivationCheckpointing,
    compiled: bool,
) -> ModelTraits:
    """Switch on all that the training of a model needs, on the device that it is to be trained on; or refuse it."""
    _check_model(model, builder.lora is not None, trainer)
    _warn_of_half_precision(model, builder, trainer)
    model.train()  # `from_pretrained` leaves it in eval mode, where dropout and checkpointing are off
    if checkpointing.activation_offloading and next(model.parameters()).device.type == "cpu":
        rank_zero_info("On the CPU all activations are in main memory, with or without `activation_offloading`.")
        checkpointing = replace(checkpointing, activation_offloading=False)
    checkpointing.enable(model)
    keep_rotary_by_row(model)
    dtype = _precision_of(trainer).compute_dtype
    check_causal(model, dtype)
    traits = ModelTraits(enable_packing(model, dtype), num_positions(model), router_coefficient(model))
    if traits.why_not_packed:
        rank_zero_info(f"Batches are padded: {traits.why_not_packed}.")
    if find_linear_head(model) is None:
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        rank_zero_info(
            f"Logits are stored: {type(model).__name__} computes them in an unknown way. Each response token of a "
            f"microbatch takes some {3 * 4 * vocab_size / 1e6:.2g} MB for them and their gradients."
        )
    if compiled:
        compile_blocks(model)
    reshard(model)
    return traits


def _precision_of(trainer: L.Trainer | None) -> Precision:
    return Precision.of(getattr(trainer, "precision", None))
