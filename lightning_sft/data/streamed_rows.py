"""Training rows that are read and tokenised while training."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, TypeAlias

from datasets import Dataset

from lightning_sft.data.encoded_rows import EncodedRows, rows_in_memory
from lightning_sft.data.encoding import RowEncoder
from lightning_sft.data.prepared_rows import PreparedRows, SplitStatistics
from lightning_sft.data.row_report import BadRowLog, report_rows
from lightning_sft.data.run_identity import check_same_data
from lightning_sft.data.steps.plan import BatchPlan, StepRule
from lightning_sft.data.steps.step_loader import LoaderOptions, StepNumbers
from lightning_sft.data.stream.row_stream import RowStream, only_name, open_streams
from lightning_sft.data.stream.row_windows import RowWindows
from lightning_sft.data.stream.stream_loader import StreamLoader
from lightning_sft.data.stream.streamed_steps import Bookmark, StreamedSteps
from lightning_sft.loops.progress import EpochPosition
from lightning_sft.loops.run_length import Epoch

_NUM_FIRST_ROWS = 1000
_ENDLESS = 2**31


class StreamedRows:
    """Rows behind a data argument, with the methods of `PreparedRows`.

    The first of them are encoded at once. They are shown, prompt the model where there are no validation rows, and
    tell of errors before training. All are read, and shuffled, in blocks of `rows_per_block`.
    """

    label = f"first {_NUM_FIRST_ROWS:,} rows"

    def __init__(self, data: object, encoder: RowEncoder, rule: StepRule, rows_per_block: int) -> None:
        self._streams = open_streams(data, "train_data")
        self._encoder, self._rule, self._rows_per_block = encoder, rule, rows_per_block
        self._bookmarks: dict[int, Bookmark] = {}
        self._saved_positions: dict[int, EpochPosition] = {}
        encoded = _encode_first(self._streams, encoder)
        self._first = PreparedRows(
            self.label, encoded.dataset, rule, report=encoded.report, only_source=only_name(self._streams)
        )
        self._bad_rows = BadRowLog("train_data", encoded.report.bad_rows)

    @property
    def rows(self) -> Dataset:
        """The first rows, encoded."""
        return self._first.rows

    def plan(self, world_size: int) -> BatchPlan:
        """The optimizer steps over the first rows."""
        return self._first.plan(world_size)

    def count_steps(self) -> None:
        """None, since the number of rows is not known; first rows that are too long are refused."""
        self._first.count_steps()

    def lengths(self) -> list[int]:
        """Tokens of the first rows as the model sees them, the longest first.

        A later row may be longer, so the longest counts as long as `max_length` allows, if that is given.
        """
        lengths, max_length = self._first.lengths(), self._encoder.encoding.max_length
        return lengths if max_length is None else [max(max_length - 1, 1), *lengths[1:]]

    def statistics(self) -> SplitStatistics:
        """What the first rows are, in numbers."""
        return replace(self._first.statistics(), steps_per_epoch=None)

    def facts(self, source: str | None) -> dict[str, Any]:
        """What a model card says of them: where they come from."""
        return {"train": f"{source}, streamed"}

    def loader(self, epoch: Epoch | None, steps: StepNumbers | None, options: LoaderOptions) -> StreamLoader:
        """As `PreparedRows.loader`; without numbers of steps it has no end."""
        epoch = epoch or Epoch(_ENDLESS)
        seed = self._rule.seed if epoch.shuffle else None
        windows = RowWindows(self._streams, self._encoder, self._rule.batch_size, self._rows_per_block, seed)
        steps_per_pass = epoch.num_steps if epoch.is_limited else None
        made = StreamedSteps(self._rule, self._encoder.encoding, options, steps_per_pass, only_name(self._streams))
        numbers = range(_ENDLESS) if steps is None else steps
        return StreamLoader(windows, made, numbers, options, self._bookmarks, self._bad_rows)

    def position(self, num_steps: int) -> EpochPosition:
        """Where a run is in its passes through the data, after the steps of its checkpoint or the latest steps made."""
        latest, after = self._bookmarks.get(num_steps), self._bookmarks.get(num_steps + 1)
        if num_steps in self._saved_positions or latest is None:
            return self._saved_positions.get(num_steps, EpochPosition())
        is_whole = after is not None and after.epoch > latest.epoch
        return EpochPosition(latest.epoch, latest.num_steps_in_epoch, is_whole)

    def state(self, num_steps: int) -> dict[str, Any]:
        """What the order of the rows depends on, the bookmark of the last step, and whether an epoch ends there."""
        bookmark = self._bookmarks.get(num_steps)
        last = None if bookmark is None else asdict(bookmark)
        return {**self._identity, "last": last, "ends_epoch": self.position(num_steps).is_whole}

    def resume(self, state: Mapping[str, Any]) -> None:
        """As `PreparedRows.resume`; whether the rows are the same is found out when the first step is made."""
        saved = dict(state)
        last, ends_epoch = saved.pop("last", None), saved.pop("ends_epoch", False)
        check_same_data(saved, self._identity)
        self._bookmarks.clear()
        if last is not None:
            bookmark = self._bookmarks[last["num_steps"]] = Bookmark.from_values(last)
            position = EpochPosition(bookmark.epoch, bookmark.num_steps_in_epoch, ends_epoch)
            self._saved_positions = {bookmark.num_steps: position}

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "streaming": True,
            "shuffle_buffer": self._rows_per_block,
            "batch_size": self._rule.batch_size,
            "seed": self._rule.seed,
        }


TrainingRows: TypeAlias = PreparedRows | StreamedRows


def _encode_first(streams: Sequence[RowStream], encoder: RowEncoder) -> EncodedRows:
    read = list(islice((row for stream in streams for row in stream.read()), _NUM_FIRST_ROWS))
    encoded = rows_in_memory(encoder.encode(read, only_name(streams)))
    report_rows("train_data", encoded, encoder, part=f", {StreamedRows.label}")
    return encoded
