"""What one device needs for each optimizer step of a plan, in order, from any position on."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.forking import collect_before_forking
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.plan import BatchPlan
from lightning_sft.data.tokens.collation import collate
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.microbatch import Layout
from lightning_sft.data.tokens.tokenization import pad_token_id


class StepNumbers(Sized, Iterable[int], Protocol):
    """Numbers of optimizer steps over the whole run, from 0, such as a `range`."""


class EpochByEpoch:
    """The steps of the first epoch, and once the last of an epoch has been asked for, those of the next one."""

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._epoch = 0

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self._steps_per_epoch
        for step in range(first, first + self._steps_per_epoch):
            # Before the last one is handed out: Lightning does not ask whether there is another.
            self._epoch += step + 1 == first + self._steps_per_epoch
            yield step


@dataclass(frozen=True)
class LoaderOptions:
    """How optimizer steps are made for one device.

    Attributes:
        tokenizer: Of the rows. Steps show themselves with it.
        layout: Of the microbatches.
        rank: Of the device.
        world_size: Number of devices.
        num_workers: Processes that make steps ahead of time.
        pin_memory: Whether steps are put into memory that CUDA copies from by itself.
        num_positions: Inputs that the model takes at the most. None: any number.
    """

    tokenizer: PreTrainedTokenizerBase
    layout: Layout = "padded"
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    num_positions: int | None = None

    @property
    def pad_id(self) -> int:
        """Fills padded positions."""
        return pad_token_id(self.tokenizer)


class ExampleReader:
    """Reads examples out of encoded rows, which have the columns of `EncodedRows.dataset`."""

    def __init__(self, rows: Dataset) -> None:
        columns = ["input_ids", "num_prompt_tokens", "location"]
        # A list for each row takes its time to read, and few data sets have any.
        if any(len(chunk.flatten()) for chunk in rows.data.column("excluded_spans").chunks):
            columns.append("excluded_spans")
        self._rows = rows.select_columns(columns).with_format("arrow")

    def read(self, indices: Sequence[int]) -> list[Example]:
        """The rows at these indices."""
        if not indices:
            return []
        table: pa.Table = self._rows[indices]
        columns = [_lists(each) if pa.types.is_list(each.type) else each.to_pylist() for each in table.columns]
        return [Example(**dict(zip(table.column_names, row, strict=True))) for row in zip(*columns, strict=True)]


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The list of each row. It is a view of what all rows have, which is far quicker than an array of its own."""
    lists = column.combine_chunks()
    ends, values = np.cumsum(lists.value_lengths()), lists.flatten().to_numpy()
    return [values[start:end] for start, end in pairwise([0, *ends.tolist()])]


class StepDataset(TorchDataset[OptimizerStep]):
    """The optimizer steps of a plan over encoded rows, for one device."""

    def __init__(self, rows: Dataset, plan: BatchPlan, options: LoaderOptions) -> None:
        self._reader, self._plan = ExampleReader(rows), plan
        self._rank, self._layout, self._pad_id = options.rank, options.layout, options.pad_id

    def examples_of(self, step: int) -> list[list[int]]:
        """Which examples a step has on this device, in each of its microbatches."""
        return self._plan.step(step, self._layout).ranks[self._rank]

    def __getitem__(self, step: int) -> OptimizerStep:
        plan = self._plan.step(step, self._layout)
        microbatches = [
            collate(self._reader.read(indices), self._layout, self._pad_id) for indices in plan.ranks[self._rank]
        ]
        return OptimizerStep(microbatches, plan.totals)


class StepLoader(ABC):
    """Iterates over optimizer steps. No subclass of `DataLoader`: Lightning then leaves sampler and sharding alone.

    The numbers of the steps are asked for when the first step is needed.
    """

    def __init__(self, steps: StepNumbers, options: LoaderOptions) -> None:
        self._steps, self._options = steps, options

    @property
    def world_size(self) -> int:
        """Number of devices that each step is divided among."""
        return self._options.world_size

    def __len__(self) -> int:
        return len(self._steps)

    @abstractmethod
    def __iter__(self) -> Iterator[OptimizerStep]:
        """The steps. It must be a generator, whose body runs at the first `next`: a checkpoint has been restored."""


class PlanLoader(StepLoader):
    """Iterates over the optimizer steps of a plan."""

    set_name: str | None = None  # of rows that are evaluated beside those of other sets

    def __init__(self, dataset: StepDataset, steps: StepNumbers, options: LoaderOptions) -> None:
        super().__init__(steps, options)
        self.dataset = dataset

    def __iter__(self) -> Iterator[OptimizerStep]:
        collect_before_forking(self._options.num_workers)
        loader = DataLoader(
            self.dataset,
            sampler=self._steps,
            batch_size=None,
            num_workers=self._options.num_workers,
            pin_memory=self._options.pin_memory,
        )
        for step in loader:
            yield replace(step, tokenizer=self._options.tokenizer)  # here, so that no worker has to pass it on


def set_names(loaders: object) -> list[str]:
    """The names of the sets of rows that loaders go through, of one without a name its number among them.

    There are none if there is one set alone, which needs no name.
    """
    names = [getattr(loader, "set_name", None) for loader in tree_leaves(loaders)]  # in the order of Lightning
    return [name or str(index) for index, name in enumerate(names)] if len(names) > 1 or any(names) else []
