"""Where a run is in a stream of rows, as a checkpoint keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_sft.data.stream.stream_order import StreamPosition


@dataclass(frozen=True)
class Bookmark:
    """What a checkpoint keeps of a step, so that a run finds the next one.

    Attributes:
        num_steps: Optimizer steps of the run up to this one.
        begin: Where its rows begin.
        content: A hash of its rows' tokens.
        num_passes: How often the data had been gone through before its last row.
        epoch: That of its last row, from 0. Small data may come to its end several times in a step: that is one epoch.
        num_steps_in_epoch: Optimizer steps of this epoch up to this one.
    """

    num_steps: int
    begin: StreamPosition
    content: str
    num_passes: int = 0
    epoch: int = 0
    num_steps_in_epoch: int = 1

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Bookmark":
        """The bookmark whose `asdict` is given, as a checkpoint has it."""
        return cls(**{**values, "begin": StreamPosition.from_values(values["begin"])})

    def of_next(self, begin: StreamPosition, content: str, num_passes: int) -> "Bookmark":
        """That of the step after this one."""
        epoch, before = self.epoch, self.num_steps_in_epoch
        if num_passes > self.num_passes:
            epoch, before = epoch + 1, 0
        return Bookmark(self.num_steps + 1, begin, content, num_passes, epoch, before + 1)
