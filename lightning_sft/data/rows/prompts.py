"""What a model is to continue, and how `predict` hands it out."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass  # not frozen: Lightning moves batches between devices and fails on frozen dataclasses in them
class Prompt:
    """One text to continue.

    Attributes:
        index: Its number in the data, from 0. The samples that are drawn for it depend on this number.
        text: The text.
        ground_truth: The reference answer. None: responses are not scored.
        as_written: Whether the text is tokenised as it stands, without the tokenizer's own prefix (BOS), since a chat
            template has written it, or it was given as tokens.
    """

    index: int
    text: str
    ground_truth: str | None
    as_written: bool = False


class PromptLoader:
    """Iterates over prompts, several at a time, in their order. All devices get the same ones, to share them out."""

    def __init__(self, prompts: list[Prompt], batch_size: int) -> None:
        self._prompts, self._batch_size = prompts, batch_size

    def __len__(self) -> int:
        return -(-len(self._prompts) // self._batch_size)

    def __iter__(self) -> Iterator[list[Prompt]]:
        for start in range(0, len(self._prompts), self._batch_size):
            yield self._prompts[start : start + self._batch_size]
