"""What one rank needs for each optimizer step of a plan, in order, from any position on."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.collation import collate
from lightning_sft.data.example import Example
from lightning_sft.data.microbatch import Microbatch
from lightning_sft.data.optimizer_step import OptimizerStep
from lightning_sft.data.plan import BatchPlan, Layout, StepRule


def plan_steps(num_tokens: ArrayLike, num_response_tokens: ArrayLike, rule: StepRule, **options: Any) -> BatchPlan:
    """The plan of the optimizer steps over rows of so many tokens; options as `BatchPlan` takes them."""
    num_inputs = np.asarray(num_tokens) - 1  # the last token is only a label
    return BatchPlan(np.maximum(num_inputs, 1), num_response_tokens, rule, **options)


class StepDataset(torch.utils.data.Dataset):
    """What one rank needs for each optimizer step of a plan."""

    def __init__(self, rows: Dataset, plan: BatchPlan, rank: int, pad_id: int, layout: Layout = "padded") -> None:
        self._columns = ["input_ids", "num_prompt_tokens"]
        if any(len(chunk.flatten()) for chunk in rows.data.column("excluded_spans").chunks):
            self._columns.append(
                "excluded_spans"
            )  # a list for each row takes its time to read, and few data sets have any
        self._rows = rows.select_columns([*self._columns, "location"]).with_format("numpy")
        self._plan, self._rank, self._pad_id, self._layout = plan, rank, pad_id, layout

    def __getitem__(self, step: int) -> OptimizerStep:
        plan = self._plan.step(step, self._layout)
        return OptimizerStep([self.collate(indices) for indices in plan.ranks[self._rank]], plan.totals)

    def collate(self, indices: list[int]) -> Microbatch:
        """The rows at these indices as one microbatch."""
        examples: list[Example] = []
        if indices:
            batch = self._rows[indices]
            locations = batch["location"].tolist()
            columns = zip(*(batch[name] for name in self._columns), strict=True)
            examples = [
                Example(**dict(zip(self._columns, values, strict=True)), location=location)
                for values, location in zip(columns, locations, strict=True)
            ]
        return collate(examples, self._layout, self._pad_id)


class StepLoader:
    """Iterates over optimizer steps. No subclass of `DataLoader`: Lightning then leaves sampler and sharding alone."""

    def __init__(
        self,
        dataset: Any,
        num_steps: int,
        num_workers: int,
        first_step: Callable[[], int] = lambda: 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._num_steps, self._num_workers = dataset, num_steps, num_workers
        self._first_step, self._tokenizer, self._pin_memory = first_step, tokenizer, pin_memory

    def __len__(self) -> int:
        return self._num_steps

    def state_dict(self) -> dict[str, Any]:
        """Empty: a run's step says where to begin. Having it tells Lightning that the loader can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore here."""

    def __iter__(self) -> Iterator[OptimizerStep]:
        # The body of a generator runs at the first `next`: after a checkpoint's number of steps was restored.
        loader = DataLoader(
            self._dataset,
            sampler=range(self._first_step(), self._num_steps),
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
        )
        for step in loader:
            yield replace(step, tokenizer=self._tokenizer)  # here, so that no worker has to pass the tokenizer on
