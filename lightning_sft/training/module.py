"""`SFTModule`: one `training_step` is one optimizer step."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerPLType, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GenerationConfig, PreTrainedModel

from lightning_sft.checks import check_callable, check_integer, check_number, check_type
from lightning_sft.data.microbatch import Microbatch
from lightning_sft.data.optimizer_step import OptimizerStep
from lightning_sft.data.prompts import Prompt
from lightning_sft.errors import SettingsError, and_more
from lightning_sft.model.attention import enable_packing, packed_inputs
from lightning_sft.model.head import ResponseScores
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.lora import add_lora, check_settings, has_lora, lora_config
from lightning_sft.model.precision import FLOAT32, Precision
from lightning_sft.model.pretrained import build_empty_model, build_model, enable_gradient_checkpointing
from lightning_sft.model.quantization import is_quantized
from lightning_sft.model.sharding import gradient_sync, is_sharded, load_sharded, shard
from lightning_sft.training.guard import NonFinite, StepGuard
from lightning_sft.training.losses import LossNormalization, LossScale
from lightning_sft.training.metrics import ResponseMetrics
from lightning_sft.training.run_facts import run_facts
from lightning_sft.training.schedule import Schedule
from lightning_sft.training.state_memory import parameter_counts, state_memory
from lightning_sft.training.trainer_checks import check_trainer


class SFTModule(L.LightningModule):
    """Fine-tunes a causal language model on the responses of prompt/output pairs.

    A batch is everything one optimizer step needs (see `SFTDataModule`): `training_step` accumulates the gradients
    of its microbatches, clips, and steps optimizer and schedule. The loss is normalised by the totals of the whole
    step, so it does not depend on how the step is split over microbatches and devices.

    Args:
        model: Name or path of a pretrained model; or the settings of a configuration with `model_type`, such as
            `{model_type: qwen2, vocab_size: 512, hidden_size: 128}`, to train from scratch; or a model.
        loss_normalization: `token`: negative log-likelihood per response token of the optimizer step. `sequence`:
            summed over each response, divided by `normalize_constant`, averaged over the step's sequences.
        normalize_constant: Divides the loss under `sequence`.
        max_grad_norm: Gradients are scaled down to this total norm. None: no clipping.
        optimizer: Any torch optimizer, by class path, and its arguments. Default: AdamW without weight decay, 1e-5.
        lr_scheduler: Schedule by the name that `transformers` gives it, such as `cosine`, `linear` or `constant`.
        warmup_steps: Optimizer steps over which the learning rate rises; below 1: a share of the run.
        lr_scheduler_kwargs: Further arguments of the schedule.
        gradient_checkpointing: Recompute activations in backward: less memory, about a third more time.
        compile: Compile the model's body for training and validation: a minute or two at the start, faster steps.
        nonfinite: What happens to an optimizer step whose loss or gradient norm is not a finite number. `error`: the
            run stops and names the step's rows; nothing of it is saved. `skip`: weights, optimizer and schedule stay
            as they are, and `train/skipped_steps` counts it; the device is waited for in every step.
        sync_every_microbatch: Exchange gradients after each microbatch rather than once per optimizer step. Default:
            only where the model is sharded, since whole gradients need memory there.
        lora: Train adapters beside frozen weights: arguments of `peft.LoraConfig`, such as `{r: 16, lora_alpha: 32}`.
            Unless they say otherwise, every linear layer but the head is adapted. Under `bf16-mixed` adapters are
            float32, and frozen weights stay in the dtype that they are stored in.
        model_kwargs: Passed to `from_pretrained` or `from_config`, such as `attn_implementation`.
        seed: Of weights trained from scratch, and of dropout, which is drawn anew from (seed, step, device) in each
            step. On the command line it is the seed of the data.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, the model cannot be loaded, or it does not fit the data.
    """

    model: PreTrainedModel
    why_not_packed: str | None = "its model is not loaded yet"
    generator: Callable[[Sequence[Prompt]], Sequence[object]] | None = None  # makes the predictions of a run

    def __init__(
        self,
        model: str | dict[str, Any] | PreTrainedModel,
        loss_normalization: LossNormalization = "token",
        normalize_constant: float = 1.0,
        max_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
        lr_scheduler: str = "cosine",
        warmup_steps: float = 0.03,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        nonfinite: NonFinite = "error",
        sync_every_microbatch: bool | None = None,
        lora: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_type("model", model, (str, Path, dict, PreTrainedModel), "a name, a path, settings or a model")
        self.loss_scale = LossScale(loss_normalization, normalize_constant)
        self.guard = StepGuard(nonfinite)
        self._schedule = Schedule(lr_scheduler, warmup_steps, lr_scheduler_kwargs)
        check_number("max_grad_norm", max_grad_norm, "a positive number or none", lambda norm: norm > 0, optional=True)
        check_callable("optimizer", optimizer, "a function of the parameters")
        check_integer("seed", seed, at_least=0)
        check_type("model_kwargs", model_kwargs, dict, "a mapping of arguments", optional=True)
        check_type("lora", lora, dict, "a mapping of arguments", optional=True)
        if lora is not None:
            lora_config(lora)  # refuses what is wrong now rather than after loading
        # Only what a checkpoint can hold without pickling code; `on_save_checkpoint` adds the model's configuration.
        self.save_hyperparameters(
            *(
                "loss_normalization",
                "normalize_constant",
                "max_grad_norm",
                "lr_scheduler",
                "warmup_steps",
                "seed",
                "lora",
            )
        )
        self.automatic_optimization = False
        if not isinstance(model, PreTrainedModel):  # which as a submodule would be saved twice
            self._source = str(model) if isinstance(model, Path) else model
        self._max_grad_norm = max_grad_norm
        self._optimizer = optimizer
        self.gradient_checkpointing = gradient_checkpointing
        self._compile = compile
        self._sync_every_microbatch = sync_every_microbatch
        self._model_kwargs = model_kwargs or {}
        self._lora = lora
        if lora is not None:  # checkpoints hold what is trained
            self.strict_loading = False
            self.register_state_dict_post_hook(_drop_frozen)
            self.register_load_state_dict_post_hook(_miss_no_frozen)
        self._seed = seed
        self._saved_groups: list[set[str]] = []  # settings of the optimizer of the checkpoint that a run goes on from
        self.metrics = nn.ModuleDict({stage: ResponseMetrics(self.loss_scale) for stage in ("val", "test")})
        if isinstance(model, PreTrainedModel):
            self.model = model

    def setup(self, stage: str) -> None:
        """A new run counts its optimizer steps from 0, and its callbacks say anew how predictions are made."""
        self.generator = None
        if stage == "fit":
            self.guard.start_run()

    def configure_model(self) -> None:
        """Load or build the model, once, shard it if the strategy asks for that, and switch it to training mode.

        Raises:
            ValueError: If the strategy cannot train it.
        """
        check_trainer(self._trainer)
        strategy = getattr(self._trainer, "strategy", None)
        loaded = isinstance(getattr(self, "model", None), PreTrainedModel)
        if isinstance(strategy, ModelParallelStrategy):
            dtype = self._precision.autocast
            if not loaded:
                self.model = load_sharded(self._build, strategy.root_device, dtype, self._adapt)
            elif not is_sharded(self.model):
                shard(self._adapt(self.model), strategy.root_device.type, dtype)
            _leave_inference_mode(self.trainer)
        else:
            self.model = self._adapt(self.model) if loaded else self._build()
            if strategy is not None:
                self.to(strategy.root_device)  # Lightning would do it later; what the model can do is tried out there
        if is_quantized(self.model) and (self._lora is None or is_sharded(self.model)):
            why = "only train `lora` adapters" if self._lora is None else "not be sharded; use the strategy `ddp`"
            raise SettingsError(f"`model` is quantised by bitsandbytes, and such weights can {why}.")
        self.model.train()  # `from_pretrained` leaves it in eval mode, where dropout and checkpointing are off
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(self.model)
        self._check_vocabulary()
        self.why_not_packed = enable_packing(self.model, self._precision.compute_dtype)
        if self.why_not_packed:
            rank_zero_info(f"Batches are padded: {self.why_not_packed}.")
        if self._compile and is_sharded(self.model):
            raise SettingsError("`compile` is true, but the model is sharded. Set `compile` to false, or use `ddp`.")
        if self._compile:
            self.model.base_model.compile(dynamic=True)
            self._compile = False  # it is, from now on

    def empty_model(self, precision: Precision = FLOAT32) -> PreTrainedModel:
        """The model that is to be trained, on `meta`: shapes and types, no values; nothing of its weights is read.

        Args:
            precision: Of the trainer.
        """
        if not hasattr(self, "_source"):
            return self._adapt(build_empty_model(self.model.config.to_dict(), {"dtype": self.model.dtype}))
        return self._adapt(build_empty_model(self._source, self._load_options(precision)))

    @property
    def _precision(self) -> Precision:
        return Precision.of(getattr(self._trainer, "precision", None))

    def _build(self) -> PreTrainedModel:
        return self._adapt(build_model(self._source, self._load_options(self._precision), self._seed))

    def _load_options(self, precision: Precision) -> dict[str, Any]:
        # Frozen weights in float32 would be no more exact than in the type that they are stored in.
        as_stored = self._lora is not None and isinstance(self._source, str) and precision.is_half
        return ({"dtype": "auto"} if as_stored else {}) | self._model_kwargs

    def _adapt(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with adapters, if it is to have some and has none yet."""
        check_settings(model, self._lora)
        if self._lora is not None and not has_lora(model):
            add_lora(model, self._lora, self._seed)
        return model

    @property
    def _base_model(self) -> str | dict[str, Any] | None:
        """What the adapters are on top of; None if nobody gave it a name."""
        return getattr(self, "_source", None) or self.model.name_or_path or None

    def _check_vocabulary(self) -> None:
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        num_embeddings = cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]
        if tokenizer is not None and len(tokenizer) > num_embeddings:
            raise SettingsError(
                f"The tokenizer has {len(tokenizer)} tokens, but the model only {num_embeddings} embeddings. "
                "Use the model's own tokenizer, or call `model.resize_token_embeddings` first."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SFTModule":
        """Convert or move everything, but keep rotary frequencies in float32.

        In bfloat16 they are wrong by up to 0.5 in the cosine at position 4,000 (Lightning's `bf16-true` casts them).
        """
        exact = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.dtype == torch.float32 and not buffer.is_meta
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in exact:
            converted = getattr(module, name)
            if converted.dtype != torch.float32:
                setattr(module, name, buffer.to(converted.device))
        return self

    @contextmanager
    def trial_run(self) -> Iterator[None]:
        """Afterwards the module's trainer and guard are those of before. Steps that are not finite are skipped."""
        found = self.guard, self._trainer
        self.guard = StepGuard("skip")
        try:
            yield
        finally:
            self.guard, self._trainer = found

    @property
    def num_steps_taken(self) -> int:
        """Optimizer steps that have made these weights, also where they are only evaluated."""
        return self.global_step if self.trainer.state.fn == "fit" else self.guard.num_steps

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The model's own output."""
        return self.model(input_ids, **kwargs)

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: OptimizerStep, batch_idx: int) -> None:
        """One optimizer step over the batch's microbatches."""
        torch.manual_seed(_mixed_seed(self._seed, self.global_step, self.global_rank))  # of dropout
        optimizer = cast(Optimizer, self.optimizers())
        optimizer.zero_grad()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the loss and of the entropy
        divisor = self.loss_scale.divisor(batch.totals.num_response_tokens, batch.totals.num_sequences)
        divisor /= self.trainer.world_size  # strategies average gradients over devices; the loss is a sum over them
        every = is_sharded(self.model) if self._sync_every_microbatch is None else self._sync_every_microbatch
        for index, microbatch in enumerate(batch.microbatches):
            last = index == len(batch.microbatches) - 1
            with gradient_sync(cast(nn.Module, self.trainer.strategy.model), enabled=every or last):
                scores = self._score(microbatch, normalize_constant=divisor)
                assert scores.loss is not None  # `normalize_constant` asks for it
                self.manual_backward(scores.loss)
            totals[0] += scores.loss.detach() / self.trainer.world_size
            totals[1] += scores.token_entropy.sum()
        if self.trainer.world_size > 1:
            dist.all_reduce(totals)  # Lightning's `reduce` would wait for all devices first
        learning_rate = optimizer.param_groups[0]["lr"]
        self.guard.start_step(self.global_step + 1, batch.locations, totals[0])
        self._step(optimizer)
        self._log_step(batch, totals, learning_rate)

    def _score(self, microbatch: Microbatch, **options: Any) -> ResponseScores:
        length = microbatch.max_length
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise SettingsError(
                f"A row has {length + 1} tokens, but the model has only {longest} positions. "
                f"Set `max_length` to {longest} at most, and `too_long` to drop or truncate."
            )
        options |= packed_inputs(self.model, microbatch.model_inputs())
        return score_responses(
            self.model, microbatch.input_ids, microbatch.labels, microbatch.response_positions, **options
        )

    def _step(self, optimizer: Optimizer) -> None:
        """Step optimizer and schedule together, or neither."""
        scaler = self._grad_scaler
        scale = 0.0 if scaler is None else scaler.get_scale()
        optimizer.step()
        overflowed = scaler is not None and scaler.get_scale() < scale
        if self.guard.finish_step(overflowed):
            cast(LRSchedulerPLType, self.lr_schedulers()).step()  # type: ignore[call-arg]

    @property
    def _grad_scaler(self) -> torch.amp.GradScaler | None:
        """Scales the loss under `16-mixed`."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients here, where 16-bit precision has unscaled them."""
        scaler = self._grad_scaler
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves that to the step of fused optimizers: too late for clipping
        norm = nn.utils.clip_grad_norm_(self.parameters(), self._max_grad_norm or math.inf)
        self._grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not self.guard.allows(self._grad_norm):
            for parameter in self.parameters():
                parameter.grad = None  # the optimizer leaves it alone then, and its state too

    def on_validation_start(self) -> None:
        """Do not evaluate weights of a step whose numbers are not finite."""
        self.guard.check()

    def on_train_end(self) -> None:
        """Do not end on a step whose numbers are not finite."""
        self.guard.check()

    def _log_step(self, batch: OptimizerStep, totals: Tensor, learning_rate: float) -> None:
        self.log("train/loss", totals[0].float(), prog_bar=True)
        numbers = {"train/learning_rate": learning_rate, "step": self.global_step}  # `step` is every logger's x-axis
        if self.guard.skips:
            numbers["train/skipped_steps"] = self.guard.num_skipped
        on_device = {
            "train/token_entropy": (totals[1] / batch.totals.num_response_tokens).float(),
            "train/grad_norm": self._grad_norm.float(),
        }
        # A plain number would be copied to the device, which would have to be waited for; `bf16-true` would round it.
        self.log_dict(on_device | {name: torch.tensor(n, dtype=torch.float64) for name, n in numbers.items()})

    # -- validation and test -------------------------------------------------------------------------------------

    def validation_step(self, batch: OptimizerStep, batch_idx: int) -> None:
        """Add the batch's sums and counts to the validation metrics."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/token_accuracy` and `val/token_entropy`."""
        self._log_metrics("val")

    def test_step(self, batch: OptimizerStep, batch_idx: int) -> None:
        """Add the batch's sums and counts to the test metrics."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the same metrics as validation, as `test/...`."""
        self._log_metrics("test")

    def _evaluate(self, stage: str, batch: OptimizerStep) -> None:
        for microbatch in batch.microbatches:
            scores = self._score(microbatch, return_is_top1=True)
            cast(ResponseMetrics, self.metrics[stage]).update(scores, microbatch.num_sequences)

    def _log_metrics(self, stage: str) -> None:
        metrics = cast(ResponseMetrics, self.metrics[stage])
        for name, value in metrics.compute().items():
            # Already over all devices; `sync_dist` averages equal numbers and keeps Lightning from warning.
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
        if stage == "val":
            self.log("step", float(self.num_steps_taken), sync_dist=True)
        metrics.reset()

    # -- prediction ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> Sequence[object]:
        """Generate responses to prompts by `generator`, which the run's `GenerationMonitor` has set.

        Raises:
            ValueError: If there is none.
        """
        if self.generator is None:
            raise SettingsError(
                "`predict` needs a `GenerationMonitor` among the trainer's callbacks, but there is none."
            )
        return self.generator(batch)

    # -- optimizers and checkpoints ------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all trainable parameters, and the schedule over the whole run."""
        optimizer = self._optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        scheduler = self._schedule.build(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model.

        Raises:
            ValueError: If names or shapes differ, or the settings of adapters.
        """
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if saved.get("lora") != self._lora:
            raise SettingsError(
                f"The checkpoint was trained with `lora` = {saved.get('lora')}, but it is {self._lora} here."
            )
        base = saved.get("model")  # a name; or the model itself that `load_from_checkpoint` was given
        if self._lora is not None and isinstance(base, str) and base != self._base_model:
            rank_zero_warn(
                f"The checkpoint's adapters are of the model {base!r}, but `model` is {self._base_model!r} here. On "
                "top of other weights they say nothing."
            )
        self._check_weights(checkpoint.get("state_dict"))
        self.guard.start_run(checkpoint.get("global_step", 0), checkpoint.get("num_skipped_steps", 0))
        if "generation_config" in checkpoint:
            self.model.generation_config = GenerationConfig.from_dict(checkpoint["generation_config"])
        states = checkpoint.get("optimizer_states") or [{}]
        self._saved_groups = [set(group) for group in states[0].get("param_groups", [])]

    def _check_weights(self, saved: dict[str, Tensor] | None) -> None:
        if saved is None:  # sharded: the strategy has loaded them
            return
        own = self.state_dict()
        misfits = [
            f"`{name}` is {tuple(saved[name].shape)} there and {tuple(own[name].shape)} here"
            for name in own
            if name in saved and saved[name].shape != own[name].shape
        ]
        if self.strict_loading or self._lora is not None:
            misfits += [f"`{name}` is missing there" for name in own if name not in saved]
            misfits += [f"`{name}` is there alone" for name in saved if name not in own]
        if misfits:
            raise SettingsError(
                f"The checkpoint is of another model: {misfits[0]}{and_more(misfits)}. "
                "Set `model` to the one that it was trained from."
            )

    def on_fit_start(self) -> None:
        """Say how much there is to train; refuse the state of another optimizer.

        Raises:
            ValueError: If its parameter groups have other settings.
        """
        if self.trainer.is_global_zero:
            memory = state_memory(self.parameters(), self._optimizer)
            rank_zero_info(f"{parameter_counts(self.parameters())}; {memory}.")
        saved, self._saved_groups = self._saved_groups, []
        optimizer = cast(Optimizer, self.optimizers(use_pl_optimizer=False))
        for there, here in zip(saved, optimizer.param_groups, strict=False):
            missing = sorted(set(here) - there - {"initial_lr"})
            if missing:
                raise SettingsError(
                    f"The checkpoint is of a run with another optimizer: it has no `{missing[0]}`, which this run's "
                    f"{type(optimizer).__name__} needs. Set `optimizer` to the one of that run."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model's configuration and what its card says, so that loading and exporting need no other file.

        Raises:
            FloatingPointError: If the latest step's loss or gradient norm is not a finite number.
        """
        self.guard.check()
        checkpoint["num_skipped_steps"] = self.guard.num_skipped
        hyper_parameters = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        hyper_parameters["model"] = self.model.config.to_dict()
        if self._lora is not None:  # which model the adapters are for
            hyper_parameters["model"] = self._base_model
            kwargs = self._model_kwargs | {"dtype": str(self.model.dtype).removeprefix("torch.")}
            hyper_parameters["model_kwargs"] = {  # an object such as `BitsAndBytesConfig` would be pickled
                name: json.loads(value.to_json_string()) if hasattr(value, "to_json_string") else value
                for name, value in kwargs.items()
            }
        checkpoint["generation_config"] = json.loads(self.model.generation_config.to_json_string())
        checkpoint["model_card"] = asdict(run_facts(self.trainer))  # plain values, which load without code


def _leave_inference_mode(trainer: L.Trainer) -> None:
    """Evaluate without gradients, but not in inference mode: FSDP2 could not train with what it gathers first there."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    for loop in (validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False


def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    trained = {
        prefix + name for name, weight in module.named_parameters(remove_duplicate=False) if weight.requires_grad
    }
    for key in [key for key in state_dict if key.startswith(f"{prefix}model.") and key not in trained]:
        del state_dict[key]


def _miss_no_frozen(module: nn.Module, incompatible_keys: Any) -> None:
    trained = {name for name, weight in module.named_parameters(remove_duplicate=False) if weight.requires_grad}
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if key.removeprefix("module.") in trained]


def _mixed_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
