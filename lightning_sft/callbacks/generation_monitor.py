"""`GenerationMonitor`: what the model says, and how good it is, while it trains."""

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lightning_sft.callbacks.prediction_writer import PredictionWriter
from lightning_sft.checks import check_integer, check_local, check_type
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.fixed_settings import FixedSettings
from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.errors import SettingsError
from lightning_sft.generation.generate import generate_records
from lightning_sft.generation.generators import ResponseGenerator
from lightning_sft.generation.records import GenerationRecord
from lightning_sft.generation.report.report import GenerationReport, Stage
from lightning_sft.generation.sampling import Sampling
from lightning_sft.generation.settings import REWARD_SECONDS, GenerationSettings
from lightning_sft.loops.trainer_state import validation_follows
from lightning_sft.rewards.functions import RewardFunction, r1_zero_reward
from lightning_sft.training.module import SFTModule
from lightning_sft.training.run_folder import run_folder, writes_files

_PROMPTS_AT_ONCE = 1024  # between two writes to the file


class GenerationMonitor(FixedSettings, L.Callback):
    """Generates responses to a fixed set of prompts before training, every n steps, and at each validation.

    The prompts are the first validation rows (training rows if there are none). The metrics logged each time are
    `val/reward`, `val/answer_reward`, `val/format_reward`, `val/response_length`, `val/response_length_correct`,
    `val/response_length_incorrect` (tokens), `val/response_entropy` (nats), `val/reward_failures`, with several samples
    `val/pass_at_<k>`, and the cost: `val/generation_seconds`, and `val/generation_share` of the time since training
    began. TensorBoard also gets a table and histograms, the terminal a small table. The folder `<log_dir>/generations`
    gets `step_<N>.jsonl`, one line per response; `step_<N>.html`, a page to read them; and `index.html`, which shows
    all steps. Model, tokenizer and random state are left as they were.

    `test` uses the rows that it evaluates, all by default, and also logs `test/num_responses`, `test/num_correct`, and
    the bounds of a 95 % bootstrap interval, `test/answer_reward_low` and `test/answer_reward_high`. `predict` appends
    the records of all prompts to `predict_path`; after an interruption it continues where it stopped.

    Args:
        reward_fn: Function (on the command line, its import path) called with response and ground truth; returns
            `format_reward`, `answer_reward` and `reward`.
        num_prompts: Number of prompts to answer each time, over all devices; 0: nothing is generated in training and
            validation, but still by `test` and `predict`.
        every_n_steps: Also generate every n optimizer steps, besides each validation.
        sampling: How responses are drawn: greedy unless `temperature` is set.
        max_tokens_per_batch: Limits the memory: prompts of similar length share a batch of at most this many tokens on
            each device, including those still to be generated. Default: on CUDA as many as have their keys and values,
            and the logits of a forward pass, in a sixteenth of the device's memory; elsewhere, and for models that are
            sharded or have a recurrent state per sequence, 32,768.
        num_rows_shown: Rows of the table in TensorBoard; the files have all.
        reward_seconds: Time limit of `reward_fn` for one response, which counts as 0 beyond it. None: no limit.
        predict_path: File that `predict` writes. Default: a file in the folder `predictions` of `default_root_dir`,
            whose name depends on prompts, weights, rewards, sampling and generator.
        generator: Function (on the command line, its import path) that generates the responses instead of the model,
            such as an inference engine: called with model, requests and sampling; see `log_generations`. The model
            scores them.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        SettingsError: If a number is too small.
    """

    def __init__(
        self,
        reward_fn: RewardFunction = r1_zero_reward,
        num_prompts: int = 32,
        every_n_steps: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
        max_tokens_per_batch: int | None = None,
        num_rows_shown: int = 8,
        reward_seconds: float | None = REWARD_SECONDS,
        predict_path: str | Path | None = None,
        generator: ResponseGenerator | None = None,
    ) -> None:
        check_integer("num_prompts", num_prompts, at_least=0)
        check_integer("every_n_steps", every_n_steps, at_least=1, optional=True)
        if num_prompts == 0 and every_n_steps is not None:
            raise SettingsError(
                f"`num_prompts` is 0, so nothing is generated, but `every_n_steps` is {every_n_steps}. Leave one out."
            )
        check_integer("num_rows_shown", num_rows_shown, at_least=0)
        if predict_path is not None:
            check_type("predict_path", predict_path, (str, Path), "the path of a file")
            check_local("predict_path", predict_path)
        self.settings = GenerationSettings(reward_fn, sampling, max_tokens_per_batch, reward_seconds, generator)
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.num_rows_shown = num_rows_shown
        self._predictions = PredictionWriter(predict_path, self.settings)
        self._latest_step: int | None = None
        self._latest_summary: dict[str, float] = {}
        self._training_began, self._seconds_in_training = 0.0, 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make sure that there are prompts and a model, and no other monitor, which would write the same files."""
        _datamodule(trainer), _module(pl_module)
        if sum(isinstance(each, GenerationMonitor) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise SettingsError(
                "There are two `GenerationMonitor`s, which would write the same files and metrics. Keep one of them; "
                "on the command line `generation` is one."
            )
        self._latest_step = None

    # -- when ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate before the first step."""
        self._training_began, self._seconds_in_training = time.perf_counter(), 0.0
        if trainer.global_step == 0:
            self._generate_and_report(trainer, pl_module, "fit")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Generate every `every_n_steps` optimizer steps; where a validation follows, in it, of what that evaluates."""
        is_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if is_due and not validation_follows(trainer, batch_idx):
            self._generate_and_report(trainer, pl_module, "fit")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate at each validation, unless this step already has generations."""
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        summary = self._generate_and_report(trainer, pl_module, "fit" if fitting else "validate")
        for name, value in summary.items():
            if not math.isnan(value):
                # In a training run the loggers have the numbers already: this is for `ModelCheckpoint` and the like.
                logger = False if fitting else None
                pl_module.log(f"val/{name}", value, name == "answer_reward", logger, sync_dist=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate for the test rows that are evaluated."""
        for name, value in self._generate_and_report(trainer, pl_module, "test").items():
            if not math.isnan(value):
                pl_module.log(f"test/{name}", value, sync_dist=True)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module the function that makes its predictions."""
        module, prompts = _module(pl_module), _datamodule(trainer).prompts("predict")
        generate = partial(self._generate, trainer, module)
        module.generator = self._predictions.start(trainer, module, prompts, generate)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Store the batch's records."""
        self._predictions.append(trainer, outputs)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print where the records are."""
        _module(pl_module).generator = None
        self._predictions.end(trainer)

    # -- what ----------------------------------------------------------------------------------------------------

    def _generate_and_report(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Stage) -> dict[str, float]:
        """Generate over all devices, show and keep the records, and return what they add up to."""
        if self.num_prompts == 0 and stage != "test":
            return {}
        module, start = _module(pl_module), time.perf_counter()
        step = module.num_steps_taken
        if self._latest_step == step:
            return self._latest_summary
        prompts = _datamodule(trainer).prompts(stage, self._num_prompts(trainer, stage))
        folder = run_folder(trainer) / "generations"
        report = GenerationReport(stage, step, folder if writes_files(trainer) else None)
        for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
            report.add(self._generate(trainer, module, prompts[first : first + _PROMPTS_AT_ONCE]))
        summary = report.summary()
        self._latest_step, self._latest_summary = step, summary
        cost = self._cost_since(start, stage)
        if trainer.is_global_zero:
            report.show(summary, cost, trainer.loggers, self.num_rows_shown)
        return summary

    def _num_prompts(self, trainer: L.Trainer, stage: Stage) -> int:
        if stage != "test":
            return self.num_prompts
        return int(trainer.num_test_batches[0]) * _datamodule(trainer).rule.batch_size  # see `limit_test_batches`

    def _generate(self, trainer: L.Trainer, module: SFTModule, prompts: Sequence[Prompt]) -> list[GenerationRecord]:
        """Records of prompts, made by all devices together; each gets all of them."""
        tokenizer, distributed = _datamodule(trainer).tokenizer, trainer.world_size > 1
        with trainer.precision_plugin.forward_context():
            return generate_records(module.model, tokenizer, prompts, self.settings, distributed=distributed)

    def _cost_since(self, start: float, stage: Stage) -> dict[str, float]:
        """The seconds that this step's generations have taken; in training also the share of all steps' in its time."""
        now = time.perf_counter()
        if stage != "fit":
            return {"generation_seconds": now - start}
        self._seconds_in_training += now - start
        share = self._seconds_in_training / (now - self._training_began)
        return {"generation_seconds": now - start, "generation_share": share}


def _datamodule(trainer: L.Trainer) -> SFTDataModule:
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, SFTDataModule):
        raise SettingsError("`GenerationMonitor` takes its prompts from an `SFTDataModule`; pass one to the trainer.")
    return datamodule


def _module(pl_module: L.LightningModule) -> SFTModule:
    if not isinstance(pl_module, SFTModule):
        raise SettingsError("`GenerationMonitor` generates with an `SFTModule`; pass one to the trainer.")
    return pl_module
