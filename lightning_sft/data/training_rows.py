"""What the datamodule asks of the training rows, be they prepared before training or streamed while it goes on."""

from collections.abc import Mapping
from typing import Any, Protocol

from datasets import Dataset

from lightning_sft.data.split_statistics import SplitStatistics
from lightning_sft.data.steps.plan import BatchPlan
from lightning_sft.data.steps.step_loader import LoaderOptions, StepLoader, StepNumbers
from lightning_sft.loops.progress import EpochPosition
from lightning_sft.loops.run_length import Epoch


class TrainingRows(Protocol):
    """The training rows; `PreparedRows` or `StreamedRows`."""

    @property
    def label(self) -> str:
        """What a preview calls the rows that its numbers are of."""

    @property
    def rows(self) -> Dataset:
        """Encoded rows: all of them, or the first ones of a stream."""

    def statistics(self) -> SplitStatistics:
        """Of `rows`."""

    def facts(self, source: str | None) -> dict[str, Any]:
        """What a model card says of them: where they come from, by the key `train`, and their numbers."""

    def lengths(self) -> list[int]:
        """Tokens of `rows` as the model sees them, the longest first; of a stream it is as long as any row may be."""

    def plan(self, world_size: int) -> BatchPlan:
        """The optimizer steps over `rows`."""

    def count_steps(self) -> int | None:
        """Optimizer steps that go once through the data; None if nobody knows.

        Raises:
            SettingsError: If one of `rows` is longer than `max_tokens_per_microbatch`.
        """

    def position(self, num_steps: int) -> EpochPosition:
        """Where in epochs that go once through the data a run is after so many optimizer steps.

        Args:
            num_steps: Of a stream: those of the checkpoint that the run continues from, or of the latest steps made.
        """

    def loader(self, epoch: Epoch | None, steps: StepNumbers | None, options: LoaderOptions) -> StepLoader:
        """Iterates over optimizer steps.

        Args:
            epoch: What an epoch takes of the data. None: all, shuffled.
            steps: The numbers of the steps. None: of an epoch, each pass over all of it being the next; or of a stream
                without an end.
            options: How steps are made.
        """

    def state(self, num_steps: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data, in plain values.

        Args:
            num_steps: Optimizer steps of the run so far.
        """

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue a run.

        Args:
            state: Of its checkpoint.

        Raises:
            SettingsError: If it was made with other rows, or another `batch_size` or `seed`.
        """
