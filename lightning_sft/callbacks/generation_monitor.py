"""`GenerationMonitor`: what the model says, and how good it is, while it trains."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.checks import check_integer, check_type
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten
from lightning_sft.generation.generate import MAX_TOKENS_PER_BATCH, REWARD_SECONDS, RewardFn, log_generations
from lightning_sft.generation.predictions import PredictionFile, prediction_run
from lightning_sft.generation.records import GenerationRecords, bootstrap_interval, summarize, write_records
from lightning_sft.generation.report.loggers import log_records, print_records
from lightning_sft.generation.report.page import update_index, write_page
from lightning_sft.generation.sampling import Sampling
from lightning_sft.rewards.functions import r1_zero_reward
from lightning_sft.training.run_folder import run_folder

Rows = Sequence[dict[str, Any]]
_AT_ONCE = 1024  # prompts
_KEPT_WHOLE = 500  # records whose tokens stay in memory, and which are on the page
_ROWS_IN_TERMINAL = 3


class GenerationMonitor(L.Callback):
    """Generates for a fixed set of prompts before training, every so many steps, and at each validation.

    The prompts are the first validation rows (training rows where there are none). Logged each time: `val/reward`,
    `val/answer_reward`, `val/format_reward`, `val/response_length`, `val/response_length_correct`,
    `val/response_length_incorrect` (tokens), `val/response_entropy` (nats), `val/reward_failures`, with several
    samples `val/pass_at_<k>`, and what it takes: `val/generation_seconds`, and `val/generation_share` of the time
    since training began. TensorBoard also gets a table and histograms, a terminal a small table. In
    `<log_dir>/generations` are `step_<N>.jsonl`, one line for each response; `step_<N>.html`, a page to read them on;
    and `index.html`, which walks through the steps. Model, tokenizer and random state are left as they were found.

    `test` uses all test rows and also logs `test/num_responses`, `test/num_correct`, and the bounds of a 95 % bootstrap
    interval, `test/answer_reward_low` and `test/answer_reward_high`. `predict` appends the records of all prompts to
    `predict_path`; interrupted, it goes on where it stopped.

    Args:
        reward_fn: Function by import path, called with response and ground truth; returns `format_reward`,
            `answer_reward` and `reward`.
        num_prompts: Prompts generated for each time, over all devices.
        every_n_steps: Also generate every so many optimizer steps, besides each validation.
        sampling: How responses are drawn: greedy unless `temperature` is set.
        max_tokens_per_batch: Prompts of similar length share a batch of at most this many tokens, those that may be
            generated included, on each device: it bounds the memory.
        num_rows_shown: Rows of the table in TensorBoard; the files hold all.
        reward_seconds: The most that `reward_fn` may take for one response, which then counts as 0. None: no limit.
        predict_path: File that `predict` writes. Default: in the folder `predictions` of `default_root_dir`, by a name
            that depends on prompts, weights, rewards and sampling.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is too small.
    """

    def __init__(
        self,
        reward_fn: RewardFn = r1_zero_reward,
        num_prompts: int = 32,
        every_n_steps: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
        max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
        num_rows_shown: int = 8,
        reward_seconds: float | None = REWARD_SECONDS,
        predict_path: str | Path | None = None,
    ) -> None:
        if not callable(reward_fn):
            raise SettingsTypeError(
                f"`reward_fn` is {shorten(reward_fn)}, expected a function of response and ground truth."
            )
        check_type("sampling", sampling, Sampling, "a `Sampling`")
        if predict_path is not None:
            check_type("predict_path", predict_path, (str, Path), "the path of a file")
        if reward_seconds is not None:
            check_type("reward_seconds", reward_seconds, Real, "a number of seconds, or none")
            if not 0 < reward_seconds < math.inf:
                raise SettingsError(f"`reward_seconds` is {reward_seconds}, expected a positive number, or none.")
        for name, value in {
            "num_prompts": num_prompts,
            "every_n_steps": every_n_steps,
            "max_tokens_per_batch": max_tokens_per_batch,
        }.items():
            check_integer(name, value, optional=True)
            if value is not None and value < 1:
                raise SettingsError(f"`{name}` is {value}, expected at least 1.")
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.sampling = sampling
        self.num_rows_shown = num_rows_shown
        self.predict_path = predict_path
        self._options: dict[str, Any] = {
            "reward_fn": reward_fn,
            "sampling": sampling,
            "max_tokens_per_batch": max_tokens_per_batch,
            "reward_seconds": reward_seconds,
        }
        self._latest: tuple[int, dict[str, float]] | None = None  # step and summary
        self._began, self._seconds = 0.0, 0.0  # when training did, and how much of it was spent here
        self._num_done, self._earlier = 0, GenerationRecords()  # of an interrupted `predict`

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make sure that there are prompts and a tokenizer."""
        if not hasattr(getattr(trainer, "datamodule", None), "prompts"):
            raise SettingsError(
                "`GenerationMonitor` takes its prompts from an `SFTDataModule`; pass one to the trainer."
            )
        self._latest = None

    # -- when ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the model says before it learns anything."""
        self._began, self._seconds = time.perf_counter(), 0.0
        if trainer.global_step == 0:
            self._generate_and_log(trainer, pl_module, "fit")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every `every_n_steps` optimizer steps."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._generate_and_log(trainer, pl_module, "fit")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """At each validation; not again if this step has just been shown."""
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        summary = self._generate_and_log(trainer, pl_module, "fit" if fitting else "validate")
        for name, value in summary.items():
            if not math.isnan(value):
                # In a training run the loggers have the numbers already: this is for `ModelCheckpoint` and the like.
                logger = False if fitting else None
                pl_module.log(f"val/{name}", value, name == "answer_reward", logger, sync_dist=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Over all test rows."""
        for name, value in self._generate_and_log(trainer, pl_module, "test").items():
            if not math.isnan(value):
                pl_module.log(f"test/{name}", value, sync_dist=True)

    # -- training, validation, test ------------------------------------------------------------------------------

    def _generate_and_log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> dict[str, float]:
        """Generate over all devices, show and keep the records, and return what they add up to."""
        step, start = getattr(pl_module, "num_steps_taken", trainer.global_step), time.perf_counter()
        if self._latest is not None and self._latest[0] == step:
            return self._latest[1]
        limit = None if stage == "test" else self.num_prompts
        rows = trainer.datamodule.prompts(stage, limit)  # type: ignore[attr-defined]
        folder = run_folder(trainer) / "generations"
        name = f"test_step_{step}" if stage == "test" else f"step_{step}"
        writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        records = GenerationRecords()
        for first in range(0, len(rows), _AT_ONCE):
            part = self._generate(trainer, pl_module, rows[first : first + _AT_ONCE])
            if writes:
                write_records(folder / f"{name}.jsonl", part, "a" if first else "w", step=step)
            for record in part[max(_KEPT_WHOLE - len(records), 0) :]:
                record.drop_tokens()
            records.extend(part)
        summary = summarize(records)
        if stage == "test":
            summary |= _counts(records)
        self._latest = (step, summary)
        cost = {"generation_seconds": time.perf_counter() - start}
        if stage == "fit":
            self._seconds += cost["generation_seconds"]
            cost["generation_share"] = self._seconds / (time.perf_counter() - self._began)
        if trainer.is_global_zero:
            self._show(trainer, stage, step, records, summary, cost)
        if writes:
            whole = [record.to_json() for record in records[:_KEPT_WHOLE]]
            title = f"{'Test at s' if stage == 'test' else 'S'}tep {step}"
            write_page(folder / f"{name}.html", whole, summary, title=title, num_records=len(records))
            if stage != "test":
                update_index(folder, step, f"{name}.html", summary)
        return summary

    def _show(
        self,
        trainer: L.Trainer,
        stage: str,
        step: int,
        records: GenerationRecords,
        summary: dict[str, float],
        cost: dict[str, float],
    ) -> None:
        names = ("answer_reward", "format_reward", "response_length", "response_entropy")
        parts = [f"{name} {summary[name]:.{1 if name == 'response_length' else 3}f}" for name in names]
        time_taken = f"{cost['generation_seconds']:.1f} s"
        if step and "generation_share" in cost:
            time_taken += f", generation has taken {cost['generation_share']:.0%} of the time"
        print(f"step {step}: {', '.join(parts)} ({time_taken})")
        if stage == "test" and "num_correct" in summary:
            low, high = summary["answer_reward_low"], summary["answer_reward_high"]
            print(
                f"{summary['num_correct']:.0f} of {summary['num_responses']:.0f} correct; "
                f"answer_reward {summary['answer_reward']:.4f}, 95% bootstrap interval {low:.4f} to {high:.4f}"
            )
        print_records(records[:_ROWS_IN_TERMINAL])
        failed = [record for record in records if record.reward_error is not None]
        if failed:
            rank_zero_warn(
                f"The reward function failed on {len(failed)} of {len(records)} examples, which count as 0. "
                f"The first: {failed[0].reward_error}, for the response {failed[0].response[:80]!r} "
                f"to the prompt {failed[0].prompt[-80:]!r}."
            )
        metrics = {f"val/{name}": value for name, value in (summary | cost).items() if not math.isnan(value)}
        for logger in trainer.loggers:
            log_records(logger, step, records, self.num_rows_shown)
            if stage == "fit":
                logger.log_metrics(metrics, step)

    def _generate(self, trainer: L.Trainer, pl_module: L.LightningModule, rows: Rows) -> GenerationRecords:
        """Generate for rows with `index`, `prompt`, `ground_truth` and `is_chat`, on all devices together."""
        with trainer.precision_plugin.forward_context(), _progress(trainer) as progress:
            records, _ = log_generations(
                pl_module.model,  # type: ignore[arg-type]
                trainer.datamodule.tokenizer,  # type: ignore[attr-defined]
                [row["prompt"] for row in rows],
                [row["ground_truth"] for row in rows],
                first_index=rows[0]["index"],
                as_written=[row.get("is_chat", False) for row in rows],
                distributed=trainer.world_size > 1,
                progress=progress,
                **self._options,
            )
        return records

    # -- predict -------------------------------------------------------------------------------------------------

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out what an earlier run has left to do."""
        rows = trainer.datamodule.prompts("predict")  # type: ignore[attr-defined]
        run = prediction_run(pl_module.model, rows, self.sampling, self._options["reward_fn"])  # type: ignore[arg-type]
        path = Path(self.predict_path or Path(trainer.default_root_dir) / "predictions" / f"{run}.jsonl")
        self._file = PredictionFile(path, run, self.sampling.num_samples)
        found: Any = 0, GenerationRecords()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                found = self._file.resume(keep=trainer.predict_loop.return_predictions)
            except (SettingsError, OSError) as error:  # for the others, too, which wait for this
                found = error
        found = trainer.strategy.broadcast(found)
        if isinstance(found, Exception):
            raise found
        self._num_done, self._earlier = found
        if self._num_done and trainer.is_global_zero:
            print(f"{path} has {self._num_done:,} of {len(rows):,} prompts; going on with the next.")

    def predict(self, trainer: L.Trainer, pl_module: L.LightningModule, rows: Rows) -> GenerationRecords:
        """Generate for rows of `predict` that the file does not have yet, and append their records to it.

        Args:
            trainer: The trainer.
            pl_module: The module whose model answers.
            rows: Rows of the datamodule's prompts, in their order.

        Returns:
            The records of all of these rows.
        """
        new = [row for row in rows if row["index"] >= self._num_done]
        start, stop = (index * self.sampling.num_samples for index in (rows[0]["index"], rows[-1]["index"] + 1))
        records = GenerationRecords(self._earlier[start:stop])
        if new:
            generated = self._generate(trainer, pl_module, new)
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._file.append(generated)
            records += generated
        return records

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where the records are."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            print(f"Predictions: {self._file.path}")


def _counts(records: GenerationRecords) -> dict[str, float]:
    scored = [record for record in records if record.answer_reward is not None]
    low, high = bootstrap_interval(records)
    return {
        "num_responses": float(len(records)),
        "num_correct": float(sum(record.is_correct for record in scored)) if scored else math.nan,
        "answer_reward_low": low,
        "answer_reward_high": high,
    }


@contextmanager
def _progress(trainer: L.Trainer) -> Iterator[Callable[[float], None] | None]:
    """A further line of the trainer's progress bar, if it has such a thing."""
    task = getattr(trainer.progress_bar_callback, "task", nullcontext)
    with task("Generating") as progress:
        yield progress if callable(progress) else None
