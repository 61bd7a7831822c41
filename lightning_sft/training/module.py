"""`SFTModule`: one `training_step` is one optimizer step."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from transformers import GenerationConfig, PreTrainedModel

from lightning_sft.checks import check_callable, check_integer, check_number, check_type
from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.step_loader import set_names
from lightning_sft.errors import SettingsError
from lightning_sft.loops.trainer_state import call_after_optimizer_steps
from lightning_sft.model.builder import ModelBuilder
from lightning_sft.model.checkpointing import ActivationCheckpointing
from lightning_sft.model.embedding_noise import EmbeddingNoise
from lightning_sft.model.rotary import RotaryInFloat32
from lightning_sft.model.sharding import is_sharded
from lightning_sft.model.token_loss import LossType, TokenLoss
from lightning_sft.training.checkpoint_fit import check_adapters, check_same_run, check_weights
from lightning_sft.training.checkpoint_weights import InitialWeights
from lightning_sft.training.continuing import Continuation
from lightning_sft.training.gradients import accumulate_gradients, clip_gradients, seed_dropout, unscale
from lightning_sft.training.guard import NonFinite, StepGuard
from lightning_sft.training.logged import DatedMetrics, log_gradients, log_metrics, log_settings, log_step
from lightning_sft.training.losses import LossNormalization, LossScale
from lightning_sft.training.metrics import ResponseMetrics
from lightning_sft.training.model_setup import load_model, prepare_model
from lightning_sft.training.objective import Objective
from lightning_sft.training.parameter_groups import ParameterGroups, parameters_of
from lightning_sft.training.run_facts import run_facts
from lightning_sft.training.schedule import Schedule, run_length, step_plateau_schedules, step_schedules
from lightning_sft.training.scoring import evaluate
from lightning_sft.training.state_memory import announce_state
from lightning_sft.training.stored_settings import StoredModule, keep_settings
from lightning_sft.training.trained_weights import hook_state
from lightning_sft.training.trainer_checks import check_before_setup, check_loader, put_best_first


class SFTModule(RotaryInFloat32, DatedMetrics, StoredModule):
    """Fine-tunes a causal language model on the responses of prompt/output pairs.

    A batch is everything one optimizer step needs (see `SFTDataModule`): `training_step` accumulates the gradients of
    its microbatches, clips them, and steps optimizer and schedule. The loss is normalised by the totals of the whole
    step, so it does not depend on how the step is split over microbatches and devices. It includes the router loss of a
    mixture of experts under `output_router_logits`; several microbatches then need one more forward pass.

    Args:
        model: Path or name (`name@revision` for a commit, branch or tag) of a pretrained model; a folder of `peft`
            adapters; or a configuration with `model_type`, such as `{model_type: qwen2, vocab_size: 512, hidden_size:
            128}`, to train from random weights; in Python also a model, with or without `peft` adapters.
        loss_normalization: `token`: negative log-likelihood per response token of the optimizer step. `sequence`: the
            sum over each response, divided by `normalize_constant` and averaged over the step's sequences.
        normalize_constant: Divides the loss if `loss_normalization` is `sequence`.
        loss_type: The loss of a token: `nll` is `-log p`; `dft` is `-p * log p`, with `p` as a factor without gradient
            (Dynamic Fine-Tuning); or a function (on the command line, its import path) of the log-probabilities of the
            labels, `(num_tokens,)`, that returns their losses. `val/loss` is always the negative log-likelihood.
        label_smoothing: Share of the target that is spread over the vocabulary. Capped logits are then kept in memory.
        neftune_noise_alpha: Strength of noise on the embeddings (NEFTune), such as 5. None: no noise.
        max_grad_norm: Gradients are clipped to this total norm. None: no clipping.
        optimizer: Any torch optimizer, by class path, with its arguments. Default: AdamW, rate 1e-5, no weight decay.
        parameter_groups: Optimizer settings for some parameters, such as `[{pattern: 'bias$|norm|ln_', weight_decay:
            0.0}]`: for those whose names match the pattern, a regular expression, and no earlier pattern.
        freeze: Patterns for the names of parameters that are not trained, such as `[embed_tokens, 'layers.[0-3][.]']`.
        lr_scheduler: Name of a schedule in `transformers`, such as `cosine`, `linear` or `constant`.
        warmup_steps: Optimizer steps over which the learning rate rises; if below 1, a fraction of the run.
        lr_scheduler_kwargs: Further arguments of the schedule.
        gradient_checkpointing: Recompute activations in backward, a third more time; a number n: every n-th block's.
        activation_offloading: Keep the block inputs that `gradient_checkpointing` needs in CPU memory; slower still.
        compile: Compile the model's blocks for training and validation: the first steps are slower, later ones faster.
        nonfinite: What to do with an optimizer step whose loss or gradient norm is not finite. `error`: the run stops
            and names the step's rows; nothing of this step is saved. `skip`: weights, optimizer and schedule stay as
            they are, and `train/skipped_steps` counts the step; the host then waits for the device in every step.
        sync_every_microbatch: Exchange gradients after each microbatch rather than once per optimizer step. Default:
            only if the model is sharded, since it then saves the memory of unsharded gradients.
        num_replicas: For sharded models: the number of groups of devices that each hold the whole model (HSDP).
        lora: Train adapters beside frozen weights. Arguments of `peft.LoraConfig`, such as `{r: 16, lora_alpha: 32}`,
            by default for every linear layer but the head; or `path`: a folder of adapters to train further. Under
            `bf16-mixed` adapters are float32, and frozen weights stay in the dtype in which they are stored.
        model_kwargs: Arguments for `from_pretrained` or `from_config`, such as `attn_implementation`.
        seed: Of random initial weights and, with step and device, of dropout; on the command line the seed of the data.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        SettingsError: If an argument is out of range.
    """

    model: PreTrainedModel
    why_not_packed: str | None = "its model is not loaded yet"
    num_positions: int | None = None  # that the datamodule holds rows against
    initial_weights: InitialWeights | None = None  # to begin a run with, once
    generator: Callable[[Sequence[Prompt]], Sequence[object]] | None = None  # makes the predictions of a run

    def __init__(
        self,
        model: str | dict[str, Any] | PreTrainedModel,
        loss_normalization: LossNormalization = "token",
        normalize_constant: float = 1.0,
        loss_type: LossType = "nll",
        label_smoothing: float = 0.0,
        neftune_noise_alpha: float | None = None,
        max_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
        parameter_groups: list[dict[str, Any]] | None = None,
        freeze: list[str] | None = None,
        lr_scheduler: str = "cosine",
        warmup_steps: float = 0.03,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        gradient_checkpointing: bool | int = False,
        activation_offloading: bool = False,
        compile: bool = False,
        nonfinite: NonFinite = "error",
        sync_every_microbatch: bool | None = None,
        num_replicas: int = 1,
        lora: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        arguments = dict(locals())
        check_number("max_grad_norm", max_grad_norm, "a positive number or none", lambda norm: norm > 0, optional=True)
        check_integer("num_replicas", num_replicas, at_least=1)
        check_callable("optimizer", optimizer, "a function of the parameters")
        check_type("compile", compile, bool, "true or false")
        check_type("sync_every_microbatch", sync_every_microbatch, bool, "true, false or none", optional=True)
        loss = TokenLoss(loss_type, label_smoothing)
        scale = LossScale(loss_normalization, normalize_constant)
        self.objective = Objective(loss, scale, EmbeddingNoise(neftune_noise_alpha, seed))
        self.builder = ModelBuilder(model, model_kwargs, lora, seed, freeze)
        self.checkpointing = ActivationCheckpointing(gradient_checkpointing, activation_offloading)
        self.optimizer_factory = optimizer
        self.parameter_groups = ParameterGroups(parameter_groups)
        self.schedule = Schedule(lr_scheduler, warmup_steps, lr_scheduler_kwargs)
        self.guard = StepGuard(nonfinite)
        self.num_replicas = num_replicas
        self.sync_every_microbatch = sync_every_microbatch
        self._max_grad_norm = max_grad_norm
        self._compile = compile
        self._continuation = Continuation()
        self.automatic_optimization = False
        self.metrics = ResponseMetrics(scale)  # of validation and test, which never go on at once
        if isinstance(self.builder.source, PreTrainedModel):
            self.model = self.builder.source
        hook_state(self, trained_only=self.builder.lora is not None)
        keep_settings(self, arguments | self.objective.settings())  # `on_save_checkpoint` adds the configuration

    def configure_callbacks(self) -> list[L.Callback]:
        """Add no callbacks, but refuse those of the trainer that cannot be used, before any is set up."""
        check_before_setup(self.trainer)
        put_best_first(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """A new run counts its optimizer steps from 0, and its callbacks say anew how predictions are made."""
        self.generator = None
        if stage == "fit":
            self.guard.start_run(self.global_step, self.guard.num_skipped if self.global_step else 0)
            self._continuation = self._continuation.next_run(self.trainer)

    def configure_model(self) -> None:
        """Load or build the model, once, shard it if the strategy asks for that, and switch it to training mode."""
        trainer, loaded = self._trainer, getattr(self, "model", None)
        # Lightning makes the GPU the default here, on which a generator in main memory cannot draw random numbers.
        with torch.device("cpu"):
            self.model = load_model(self.builder, loaded, trainer, self.initial_weights, self.num_replicas)
            if trainer is not None and not is_sharded(self.model):
                self.to(trainer.strategy.root_device)  # Lightning would later; what the model can do is tried out there
            self.objective.noise.install(self.model)
            traits = prepare_model(self.model, trainer, self.builder, self.checkpointing, self._compile)
        self.why_not_packed, self.num_positions = traits.why_not_packed, traits.num_positions
        self.objective = replace(self.objective, router_coefficient=traits.router_coefficient)
        self._compile, self.initial_weights = False, None  # once is enough

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The model's own output."""
        return self.model(input_ids, **kwargs)

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(self, batch: OptimizerStep, batch_idx: int) -> Tensor | None:
        """One optimizer step over the batch's microbatches, whose gradients replace any existing ones; its loss."""
        seed_dropout(self.builder.seed, self.global_step, self.global_rank)
        sums = accumulate_gradients(self, self.model, batch, self.objective, self.sync_every_microbatch)
        self.guard.announce(sums.loss, batch.locations)
        cast(Optimizer, self.optimizers()).step()  # within it, before and after: the two hooks that follow
        log_step(self, sums, batch.totals.num_response_tokens, self.guard)
        return sums.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients here, where 16-bit precision has unscaled them, and drop them if they are not finite."""
        is_scaled = unscale(self.trainer, optimizer)
        grad_norm = clip_gradients(parameters_of(optimizer), self._max_grad_norm)
        log_gradients(self, optimizer, grad_norm)
        if not self.guard.allows(self.global_step + 1, grad_norm, is_scaled=is_scaled):
            self.zero_grad()  # without a gradient the optimizer leaves a weight alone, and its state too

    def on_after_optimizer_step(self) -> None:
        """Step the schedules, unless the optimizer has left the weights alone."""
        if self.guard.allowed:
            step_schedules(self.trainer)

    def on_validation_start(self) -> None:
        """Do not evaluate weights of a step whose numbers are not finite."""
        self.guard.check()
        self.metrics.begin(set_names(self.trainer.val_dataloaders))

    def on_test_start(self) -> None:
        """Begin the metrics of all sets of test rows."""
        self.metrics.begin(set_names(self.trainer.test_dataloaders))

    def on_train_end(self) -> None:
        """Do not end on a step whose numbers are not finite."""
        self.guard.check()

    # -- validation, test and prediction ------------------------------------------------------------------------------

    def validation_step(self, batch: OptimizerStep, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Add the batch's sums and counts to the metrics, and return the scores of each microbatch."""
        return evaluate(self.model, batch, self.metrics, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity`, `val/token_accuracy` and `val/token_entropy`, also of each named set."""
        log_metrics(self, "val", self.metrics, self.num_steps_taken)
        step_plateau_schedules(self)

    def test_step(self, batch: OptimizerStep, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch's sums and counts to the metrics."""
        evaluate(self.model, batch, self.metrics, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the same metrics as validation, as `test/...`."""
        log_metrics(self, "test", self.metrics)

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> Sequence[object]:
        """Generate responses to prompts by `generator`, which the run's `GenerationMonitor` has set."""
        if self.generator is not None:
            return self.generator(batch)
        raise SettingsError("`predict` needs a `GenerationMonitor` among the trainer's callbacks, but there is none.")

    # -- optimizer and checkpoints -------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all trainable parameters, and the schedule over the whole run."""
        optimizer = self.parameter_groups.make_optimizer(self.optimizer_factory, self)
        scheduler = self.schedule.build(optimizer, run_length(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Say how much there is to train; refuse to continue with another optimizer."""
        self._continuation.check(self.trainer.optimizers, self)
        announce_state(list(self.parameters()), self.optimizer_factory)

    def on_train_start(self) -> None:
        """Let changed settings of optimizer and schedule take effect in a run that continues, or refuse them."""
        check_loader(self.trainer)
        call_after_optimizer_steps(self.trainer)
        self._continuation.apply(self.trainer)
        log_settings(self)  # no earlier: a run that would continue with others may have been refused

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, and, to continue training, of another loss."""
        check_adapters(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {}), self.builder)
        if "state_dict" in checkpoint:  # of a sharded checkpoint the strategy has loaded it
            strict = self.strict_loading or self.builder.lora is not None
            check_weights(checkpoint["state_dict"], self.state_dict(), strict)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            patterns = {"freeze": self.builder.freeze or [], "parameter_groups": self.parameter_groups.patterns}
            check_same_run(checkpoint, self.objective, patterns, self.model.name_or_path)
            self._continuation.load(checkpoint)
            self.measured_at = dict(checkpoint.get("model_card", {}).get("measured_at", {}))
        self.guard.start_run(checkpoint.get("global_step", 0), checkpoint.get("num_skipped_steps", 0))
        if "generation_config" in checkpoint:
            self.model.generation_config = GenerationConfig.from_dict(checkpoint["generation_config"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what makes the same model, and what its card says, so that exporting needs no other file.

        Raises:
            NonFiniteError: If the latest step's loss or gradient norm is not a finite number.
        """
        self.guard.check()
        self._continuation.save(checkpoint, self)
        checkpoint["num_skipped_steps"] = self.guard.num_skipped
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] |= self.builder.arguments_for(self.model)
        checkpoint["generation_config"] = json.loads(self.model.generation_config.to_json_string())
        checkpoint["model_card"] = asdict(run_facts(self.trainer))


# Pickle looks functions up by name. The default is a lambda so that the command line can show what it makes.
default_optimizer = inspect.signature(SFTModule).parameters["optimizer"].default
default_optimizer.__qualname__ = "default_optimizer"
