"""Iterates over streamed optimizer steps; processes that train together share the work of encoding rows."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from lightning_sft.data.forking import collect_before_forking
from lightning_sft.data.row_report import BadRowLog
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.step_loader import LoaderOptions, StepLoader, StepNumbers
from lightning_sft.data.stream.row_windows import Exchange, RowWindows, Window, whole_windows
from lightning_sft.data.stream.stream_order import StreamPosition
from lightning_sft.data.stream.streamed_steps import Bookmark, StreamedStep, StreamedSteps
from lightning_sft.errors import SettingsError

T = TypeVar("T")


class StreamLoader(StepLoader):
    """Iterates over streamed optimizer steps, and keeps their bookmarks.

    Where processes train together, each encodes its share of the rows and gives their tokens to all: tokens are small
    beside the time that it takes to make them, and with all of them each process plans the whole step by itself.

    Into `bookmarks`, by the number of optimizer steps, each step puts its own. Only the latest three stay: while one is
    taken, Lightning has asked for the next, and the run may be saved as it was before.
    """

    def __init__(
        self,
        windows: RowWindows,
        steps: StreamedSteps,
        numbers: StepNumbers,
        options: LoaderOptions,
        bookmarks: dict[int, Bookmark],
        bad_rows: BadRowLog,
    ) -> None:
        super().__init__(numbers, options)
        self._windows, self._made = windows, steps
        self._bookmarks, self._bad_rows = bookmarks, bad_rows
        self._exchange: Exchange | None = None

    def __iter__(self) -> Iterator[OptimizerStep]:
        first = next(iter(self._steps), 0)
        if first and first not in self._bookmarks:
            raise SettingsError(
                f"The run is at step {first}, but its checkpoint does not say where that is in the stream of "
                "`train_data`. Start anew from the weights."
            )
        for _, made in zip(self._steps, self._after(self._bookmarks.get(first)), strict=False):
            num_steps = made.bookmark.num_steps
            self._bookmarks[num_steps] = made.bookmark
            self._bookmarks.pop(num_steps - 3, None)
            self._bad_rows.add(made.bad_rows)
            yield replace(made.step, tokenizer=self._options.tokenizer)

    def _after(self, last: Bookmark | None) -> Iterator[StreamedStep]:
        """The steps after the one of a bookmark; None: from the first on."""
        options = self._options
        if options.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
            yield from _made_ahead(partial(self._made.after, last, self._windows.read), options)
            return
        if self._exchange is None:
            self._exchange = Exchange()
        exchange = self._exchange

        def open_windows(begin: StreamPosition) -> Iterator[Window]:
            share = partial(self._windows.read, begin, options.rank, options.world_size)
            return whole_windows(_made_ahead(share, options), exchange)

        for made in self._made.after(last, open_windows):
            yield made.pin_memory() if options.pin_memory else made


def _made_ahead(make: Callable[[], Iterator[T]], options: LoaderOptions) -> Iterator[T]:
    """What an iterator gives, made in a process of its own if there is to be one."""
    made = _Made(make)
    collect_before_forking(options.num_workers)
    loader = DataLoader(made, batch_size=None, num_workers=options.num_workers, pin_memory=options.pin_memory)
    for item in loader:
        if isinstance(item, SettingsError):
            raise item
        yield item


class _Made(IterableDataset[T | SettingsError], Generic[T]):
    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T | SettingsError]:
        try:
            yield from self._make()
        except SettingsError as error:  # given on, so that no worker wraps it: it is our own message
            yield error
