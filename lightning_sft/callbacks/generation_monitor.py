"""`GenerationMonitor`: what the model says, and how good it is, while it trains."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from numbers import Real
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.generation import (
    REWARD_SECONDS,
    GenerationRecord,
    RewardFn,
    Sampling,
    log_generations,
    summarize,
    write_records,
)
from lightning_sft.messages import check_integers, check_type, shorten
from lightning_sft.rewards import r1_zero_reward

Rows = Sequence[dict[str, Any]]


class GenerationMonitor(L.Callback):
    """Generates for a fixed set of prompts before training, every so many steps, and at each validation.

    The prompts are the first validation rows (training rows where there are none). Logged each time: `val/reward`,
    `val/answer_reward`, `val/format_reward`, `val/response_length`, `val/response_length_correct`,
    `val/response_length_incorrect` (tokens), `val/response_entropy` (nats) and `val/reward_failures`; a table in
    TensorBoard's text tab; and one JSON line for each example in `<log_dir>/generations/step_<N>.jsonl`. Model,
    tokenizer and random state are left as they were found. `test` and `predict` use all of their rows.

    Args:
        reward_fn: Function by import path, called with response and ground truth; returns `format_reward`,
            `answer_reward` and `reward`.
        num_prompts: Prompts generated for each time, over all devices.
        every_n_steps: Also generate every so many optimizer steps, besides each validation.
        sampling: How responses are drawn: greedy unless `temperature` is set.
        batch_size: Prompts generated for at a time, on each device.
        num_rows_shown: Rows of the table in TensorBoard; the JSON lines hold all.
        reward_seconds: The most that `reward_fn` may take for one response, which then counts as 0. None: no limit.

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
        batch_size: int = 32,
        num_rows_shown: int = 8,
        reward_seconds: float | None = REWARD_SECONDS,
    ) -> None:
        if not callable(reward_fn):
            raise TypeError(f"`reward_fn` is {shorten(reward_fn)}, expected a function of response and ground truth.")
        check_type("sampling", sampling, Sampling, "a `Sampling`")
        if reward_seconds is not None:
            check_type("reward_seconds", reward_seconds, Real, "a number of seconds, or none")
            if not 0 < reward_seconds < math.inf:
                raise ValueError(f"`reward_seconds` is {reward_seconds}, expected a positive number, or none.")
        for name, value in {
            "num_prompts": num_prompts,
            "every_n_steps": every_n_steps,
            "batch_size": batch_size,
        }.items():
            check_integers(**{name: value})
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, expected at least 1.")
        self.reward_fn = reward_fn
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.sampling = sampling
        self.batch_size = batch_size
        self.num_rows_shown = num_rows_shown
        self.reward_seconds = reward_seconds
        self._latest: tuple[int, dict[str, float]] | None = None  # step and summary
        self._predicted: list[GenerationRecord] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make sure that there are prompts and a tokenizer."""
        if not hasattr(getattr(trainer, "datamodule", None), "prompts"):
            raise ValueError("`GenerationMonitor` takes its prompts from an `SFTDataModule`; pass one to the trainer.")
        self._latest, self._predicted = None, []

    # -- when ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the model says before it learns anything."""
        if trainer.global_step == 0:
            self._summary_of(trainer, pl_module, "fit")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every `every_n_steps` optimizer steps."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._summary_of(trainer, pl_module, "fit")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """At each validation; not again if this step has just been shown."""
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        summary = self._summary_of(trainer, pl_module, "fit" if fitting else "validate")
        for name, value in summary.items():
            if not math.isnan(value):
                # In a training run the loggers have the numbers already: this is for `ModelCheckpoint` and the like.
                logger = False if fitting else None
                pl_module.log(f"val/{name}", value, name == "answer_reward", logger, sync_dist=True)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Over all test rows."""
        for name, value in self._summary_of(trainer, pl_module, "test").items():
            if not math.isnan(value):
                pl_module.log(f"test/{name}", value, sync_dist=True)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: list[GenerationRecord],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what `predict_step` generated."""
        self._predicted.extend(outputs)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write `<log_dir>/generations/predict.jsonl`."""
        # Lightning deals the rows out in turn, so taking one from each device in turn gives the order of the file.
        dealt = zip_longest(*_gather(trainer, self._predicted))
        records = [record for group in dealt for record in group if record is not None]
        path = self._folder(trainer) / "predict.jsonl"
        if trainer.is_global_zero:
            write_records(path, records)
            print(f"{len(records)} records: {path}")

    # -- what ----------------------------------------------------------------------------------------------------

    def generate(self, trainer: L.Trainer, pl_module: L.LightningModule, rows: Rows) -> list[GenerationRecord]:
        """Generate for rows with `prompt` and `ground_truth`, on this device alone."""
        with trainer.precision_plugin.forward_context():
            records, _ = log_generations(
                pl_module.model,  # type: ignore[arg-type]
                trainer.datamodule.tokenizer,  # type: ignore[attr-defined]
                [row["prompt"] for row in rows],
                [row["ground_truth"] for row in rows],
                self.reward_fn,
                sampling=self.sampling,
                batch_size=self.batch_size,
                reward_seconds=self.reward_seconds,
            )
        return records

    def _summary_of(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> dict[str, float]:
        """Generate over all devices, log table and lines, and return the averages."""
        step = trainer.global_step
        if self._latest is not None and self._latest[0] == step:
            return self._latest[1]
        limit = self.num_prompts if stage in ("fit", "validate") else None
        rows = trainer.datamodule.prompts(stage, limit)  # type: ignore[attr-defined]
        # Every device gets as many prompts as the others, some twice where the number does not divide: sharded
        # strategies need them all to take part.
        world_size, rank = trainer.world_size, trainer.global_rank
        share = [
            rows[index % len(rows)] for index in range(rank, math.ceil(len(rows) / world_size) * world_size, world_size)
        ]
        parts = _gather(trainer, self.generate(trainer, pl_module, share))
        records = [record for group in zip(*parts, strict=True) for record in group][: len(rows)]
        summary = summarize(records)
        self._latest = (step, summary)
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            self._show(trainer, stage, step, records, summary, folder)
        return summary

    def _folder(self, trainer: L.Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir) / "generations"  # `log_dir` is a collective

    def _show(
        self,
        trainer: L.Trainer,
        stage: str,
        step: int,
        records: Sequence[GenerationRecord],
        summary: dict[str, float],
        folder: Path,
    ) -> None:
        print(
            f"step {step}: answer_reward {summary['answer_reward']:.3f}, format_reward {summary['format_reward']:.3f}, "
            f"response_length {summary['response_length']:.1f}, response_entropy {summary['response_entropy']:.3f}"
        )
        failed = [record for record in records if record.reward_error is not None]
        if failed:
            rank_zero_warn(
                f"The reward function failed on {len(failed)} of {len(records)} examples, which count as 0. "
                f"The first: {failed[0].reward_error}, for the response {failed[0].response[:80]!r} "
                f"to the prompt {failed[0].prompt[-80:]!r}."
            )
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            name = f"step_{step}.jsonl" if stage != "test" else f"test_step_{step}.jsonl"
            write_records(folder / name, records, step=step)
        table = markdown_table(records[: self.num_rows_shown])
        metrics = {f"val/{name}": value for name, value in summary.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("generations", table, step)
            if stage == "fit":
                logger.log_metrics(metrics, step)


def _gather(trainer: L.Trainer, records: list[GenerationRecord]) -> list[list[GenerationRecord]]:
    """Every device's records, in the order of the ranks, on every device."""
    if trainer.world_size == 1:
        return [records]
    parts: list[list[GenerationRecord]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, records)
    return parts


def markdown_table(records: Sequence[GenerationRecord], limit: int = 600) -> str:
    """Records as a table for TensorBoard's text tab: texts escaped, long prompts cut in front, responses at the end.

    All numbers share one column: TensorBoard squeezes narrow ones until their words break.
    """
    lines = ["| prompt | response | result |", "|---|---|---|"]
    for record in records:
        prompt = record.prompt if len(record.prompt) <= limit else "… " + record.prompt[-limit:]
        response = record.response if len(record.response) <= limit else record.response[:limit] + " …"
        parts = [
            f"{record.response_length} tokens",
            f"{record.token_entropy:.3f} nats",
            f"ended by {record.stop_reason}",
        ]
        if record.reward is not None:
            shares = f"format {record.format_reward:g}, answer {record.answer_reward:g}"
            parts = [f"reward {record.reward:g} ({shares})", f"expected {record.ground_truth}", *parts]
        lines.append("| " + " | ".join(_cell(text) for text in (prompt, response, "; ".join(parts))) + " |")
    return "\n" + "\n".join(lines)


_ESCAPES = {ord(char): f"&#{ord(char)};" for char in "\\|`*_[]<>&#~!"} | {ord("\n"): "<br>", ord("\r"): ""}


def _cell(text: str) -> str:
    return text.translate(_ESCAPES) or " "
