"""`SFTModule`: one `training_step` is one optimizer step."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, cast, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerPLType, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_scheduler

from lightning_sft.attention import enable_packing, packed_inputs
from lightning_sft.log_probs import score_responses
from lightning_sft.losses import LossNormalization, loss_constant
from lightning_sft.messages import check_integers, check_type, is_missing_path, one_line, shorten
from lightning_sft.metrics import ResponseMetrics

Batch = dict[str, Any]


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
        model_kwargs: Passed to `from_pretrained` or `from_config`, such as `attn_implementation`.
        seed: Of weights trained from scratch, and of dropout, which is drawn anew from (seed, step, device) in each
            step. On the command line it is the seed of the data.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, the model cannot be loaded, or it does not fit the data.
    """

    model: PreTrainedModel
    why_not_packed: str | None = "its model is not loaded yet"

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
        model_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_type("model", model, (str, Path, dict, PreTrainedModel), "a name, a path, settings or a model")
        check_type("normalize_constant", normalize_constant, Real, "a positive number")
        check_type("warmup_steps", warmup_steps, Real, "a number of steps or a share below 1")
        check_type("max_grad_norm", 1 if max_grad_norm is None else max_grad_norm, Real, "a positive number or none")
        check_integers(seed=seed)
        for name, mapping in {"model_kwargs": model_kwargs, "lr_scheduler_kwargs": lr_scheduler_kwargs}.items():
            check_type(name, mapping or {}, dict, "a mapping of arguments")
        if not callable(optimizer):
            raise TypeError(f"`optimizer` is {shorten(optimizer)}, expected a function of the parameters.")
        if loss_normalization not in get_args(LossNormalization):
            raise ValueError(f"`loss_normalization` is {loss_normalization!r}, expected 'token' or 'sequence'.")
        for name, value in {"normalize_constant": normalize_constant, "max_grad_norm": max_grad_norm}.items():
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` is {value}, expected a positive number.")
        if seed < 0:
            raise ValueError(f"`seed` is {seed}, expected at least 0.")
        if not warmup_steps >= 0 or (warmup_steps > 1 and warmup_steps % 1):
            raise ValueError(f"`warmup_steps` is {warmup_steps}, expected a number of steps or a share below 1.")
        # Only what a checkpoint can hold without pickling code; `on_save_checkpoint` adds the model's configuration.
        self.save_hyperparameters(
            "loss_normalization", "normalize_constant", "max_grad_norm", "lr_scheduler", "warmup_steps", "seed"
        )
        self.automatic_optimization = False
        self._source = str(model) if isinstance(model, Path) else model
        self._loss_options: dict[str, Any] = {
            "loss_normalization": loss_normalization,
            "normalize_constant": normalize_constant,
        }
        self._max_grad_norm = max_grad_norm
        self._optimizer = optimizer
        self._schedule = (lr_scheduler, warmup_steps, lr_scheduler_kwargs)
        self._gradient_checkpointing = gradient_checkpointing
        self._compile = compile
        self._model_kwargs = model_kwargs or {}
        self._seed = seed
        self._saved_groups: list[set[str]] = []  # settings of the optimizer of the checkpoint that a run goes on from
        self.metrics = nn.ModuleDict({stage: ResponseMetrics(**self._loss_options) for stage in ("val", "test")})
        if isinstance(model, PreTrainedModel):
            self.model = model

    def configure_model(self) -> None:
        """Load or build the model, once, and switch it to training mode."""
        if not isinstance(getattr(self, "model", None), PreTrainedModel):
            self.model = self._build()
        self.model.train()  # `from_pretrained` leaves it in eval mode, where dropout and checkpointing are off
        if self._gradient_checkpointing:
            new_name = getattr(self.model, "activation_checkpointing_enable", None)  # transformers 5.23 renamed it
            (new_name or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self._check_vocabulary()
        self.why_not_packed = enable_packing(self.model)
        if self.why_not_packed:
            rank_zero_info(f"Batches are padded: {self.why_not_packed}.")
        if self._compile:
            self.model.base_model.compile(dynamic=True)
            self._compile = False  # it is, from now on

    def _build(self) -> PreTrainedModel:
        # Without an explicit type a half-precision checkpoint would train half-precision weights and moments.
        options = {"dtype": torch.float32, "trust_remote_code": False} | self._model_kwargs
        if isinstance(self._source, str):
            return self._load(self._source, options)
        settings = dict(cast(dict[str, Any], self._source))
        if settings.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"`model` is to be built from {settings}, whose `model_type` is no architecture that this version of "
                "`transformers` knows. Give one, such as qwen2 or llama."
            )
        try:
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed)
                return AutoModelForCausalLM.from_config(config, **options)
        except Exception as error:
            given = shorten(self._source, 200)
            raise ValueError(f"`model` is {given}, which cannot be built: {_reason(error)}") from error

    def _load(self, source: str, options: dict[str, Any]) -> PreTrainedModel:
        # Otherwise weights of other shapes are named in a log alone, and missing ones are drawn at random.
        known = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, **(options | known))
        except Exception as error:
            reason = "there is no such folder." if is_missing_path(source) else _reason(error)
            raise ValueError(f"`model` is {source!r}, which cannot be loaded: {reason}") from error
        model, loading = loaded
        misfits = [f"lack `{name}`" for name in sorted(loading["missing_keys"])]
        if not options.get("ignore_mismatched_sizes"):
            shapes = [(name, tuple(there), tuple(here)) for name, there, here in sorted(loading["mismatched_keys"])]
            misfits = [f"have `{name}` as {there} instead of {here}" for name, there, here in shapes] + misfits
        if misfits:
            raise ValueError(
                f"`model` is {source!r}, whose weights {misfits[0]}{_and_more(misfits)}: they are not those of its "
                "config.json. To train such a model all the same, load it yourself and pass it as `model`."
            )
        return model

    def _check_vocabulary(self) -> None:
        tokenizer = getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        num_embeddings = cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]
        if tokenizer is not None and len(tokenizer) > num_embeddings:
            raise ValueError(
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

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The model's own output."""
        return self.model(input_ids, **kwargs)

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step over the batch's microbatches."""
        torch.manual_seed(_mixed_seed(self._seed, self.global_step, self.global_rank))  # of dropout
        optimizer = cast(Optimizer, self.optimizers())
        optimizer.zero_grad()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the loss and of the entropy
        constant = loss_constant(batch["num_response_tokens"], batch["num_sequences"], **self._loss_options)
        # Distributed strategies average gradients over devices; the loss is a sum over them.
        constant /= self.trainer.world_size
        microbatches = batch["microbatches"]
        for index, microbatch in enumerate(microbatches):
            with self._gradient_sync(enabled=index == len(microbatches) - 1):
                scores = self._score(microbatch, normalize_constant=constant)
                self.manual_backward(scores["loss"])
            totals[0] += scores["loss"].detach() / self.trainer.world_size
            totals[1] += scores["token_entropy"].sum()
        learning_rate = optimizer.param_groups[0]["lr"]
        self._step(optimizer)
        self._log_step(batch, totals, learning_rate)

    def _score(self, microbatch: Batch, **options: Any) -> dict[str, Tensor]:
        input_ids, labels, positions = (microbatch[key] for key in ("input_ids", "labels", "response_positions"))
        length = microbatch.get("max_length_q", input_ids.shape[1])
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise ValueError(
                f"A row has {length + 1} tokens, but the model has only {longest} positions. "
                f"Set `max_length` to {longest} at most, and `too_long` to drop or truncate."
            )
        inputs = packed_inputs(self.model, microbatch)
        return score_responses(self.model, input_ids, labels, positions, **inputs, **options)

    @contextmanager
    def _gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Let devices exchange gradients only after the last microbatch."""
        wrapped = self.trainer.strategy.model
        if enabled or not isinstance(wrapped, DistributedDataParallel):
            yield
        else:
            with wrapped.no_sync():
                yield

    def _step(self, optimizer: Optimizer) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else None
        optimizer.step()
        skipped = scaler is not None and scaler.get_scale() < cast(float, scale)  # 16-mixed: gradients overflowed
        if not skipped:
            cast(LRSchedulerPLType, self.lr_schedulers()).step()  # type: ignore[call-arg]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients here, where 16-bit precision has unscaled them."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves that to the step of fused optimizers: too late for clipping
        norm = nn.utils.clip_grad_norm_(self.parameters(), self._max_grad_norm or math.inf)
        self._grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _log_step(self, batch: Batch, totals: Tensor, learning_rate: float) -> None:
        if self.trainer.world_size > 1:
            totals = cast(Tensor, self.trainer.strategy.reduce(totals, reduce_op="sum"))
        self.log("train/loss", totals[0].float(), prog_bar=True)
        self.log_dict(
            {
                "train/token_entropy": (totals[1] / batch["num_response_tokens"]).float(),
                "train/grad_norm": self._grad_norm.float(),
                "train/learning_rate": learning_rate,
                "step": float(self.global_step),  # the x-axis of every logger: optimizer steps done
            }
        )

    # -- validation and test -------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch's sums and counts to the validation metrics."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/token_accuracy` and `val/token_entropy`."""
        self._log_metrics("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch's sums and counts to the test metrics."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the same metrics as validation, as `test/...`."""
        self._log_metrics("test")

    def _evaluate(self, stage: str, batch: Batch) -> None:
        for microbatch in batch["microbatches"]:
            scores = self._score(microbatch, return_is_top1=True)
            cast(ResponseMetrics, self.metrics[stage]).update(**scores, num_sequences=microbatch["num_sequences"])

    def _log_metrics(self, stage: str) -> None:
        metrics = cast(ResponseMetrics, self.metrics[stage])
        for name, value in metrics.compute().items():
            # Already over all devices; `sync_dist` averages equal numbers and keeps Lightning from warning.
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)
        if stage == "val":
            self.log("step", float(self.global_step), sync_dist=True)
        metrics.reset()

    # -- prediction ----------------------------------------------------------------------------------------------

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[Any]:
        """Generate responses for the batch's prompts, as the run's `GenerationMonitor` is set up to.

        Raises:
            ValueError: If there is none.
        """
        for callback in cast(L.Trainer, self.trainer).callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "generate"):
                return callback.generate(self.trainer, self, batch)
        raise ValueError("`predict` needs a `GenerationMonitor` among the trainer's callbacks, but there is none.")

    # -- optimizers and checkpoints ------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all trainable parameters, and the schedule over the whole run."""
        optimizer = self._optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        name, warmup, kwargs = self._schedule
        num_steps = self.trainer.max_steps
        if num_steps < 0 and (name not in ("constant", "constant_with_warmup") or 0 < warmup < 1):
            raise ValueError(
                f"`lr_scheduler` is {name!r} with `warmup_steps` = {warmup}, but the run has no length. Set "
                "`max_steps` or `max_epochs`, or choose `constant` or `constant_with_warmup` with a number of steps."
            )
        num_warmup_steps = math.ceil(warmup * num_steps) if warmup < 1 else int(warmup)
        try:
            scheduler = get_scheduler(name, optimizer, num_warmup_steps, max(num_steps, 1), kwargs)
        except (ValueError, TypeError) as error:
            with_kwargs = f" with `lr_scheduler_kwargs` = {kwargs}" if kwargs else ""
            raise ValueError(f"`lr_scheduler` is {name!r}{with_kwargs}: {one_line(error)}") from None
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model.

        Raises:
            ValueError: If names or shapes differ.
        """
        self._check_weights(checkpoint.get("state_dict"))
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
        if self.strict_loading:
            misfits += [f"`{name}` is missing there" for name in own if name not in saved]
            misfits += [f"`{name}` is there alone" for name in saved if name not in own]
        if misfits:
            raise ValueError(
                f"The checkpoint is of another model: {misfits[0]}{_and_more(misfits)}. "
                "Set `model` to the one that it was trained from."
            )

    def on_fit_start(self) -> None:
        """Refuse the state of another optimizer.

        Raises:
            ValueError: If its parameter groups have other settings.
        """
        saved, self._saved_groups = self._saved_groups, []
        optimizer = cast(Optimizer, self.optimizers(use_pl_optimizer=False))
        for there, here in zip(saved, optimizer.param_groups, strict=False):
            missing = sorted(set(here) - there - {"initial_lr"})
            if missing:
                raise ValueError(
                    f"The checkpoint is of a run with another optimizer: it has no `{missing[0]}`, which this run's "
                    f"{type(optimizer).__name__} needs. Set `optimizer` to the one of that run."
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the model's configuration, so that loading needs no other file."""
        hyper_parameters = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        hyper_parameters["model"] = self.model.config.to_dict()


def _reason(error: Exception) -> str:
    """Why a model could not be had, with the way out where `transformers` names one that is not ours."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it brings Python code of its own, which is run only if `model_kwargs` has `trust_remote_code: true`. "
            "Read that code first."
        )
    if "Weights only load failed" in text:
        found = re.search(r"GLOBAL (\S+)", text)
        what = f"`{found[1]}`" if found else "objects"
        return f"its weights are a pickle that holds {what}, which could run code. Ask for safetensors instead."
    words = one_line(error, 200)
    return words if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {words}"


def _and_more(misfits: list[str]) -> str:
    return f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""


def _mixed_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
