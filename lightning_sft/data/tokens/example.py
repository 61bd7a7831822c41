"""One tokenised row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lightning_sft.errors import SettingsError


@dataclass(frozen=True)
class Example:
    """One tokenised row: the prompt's ids followed by the response's ids.

    Attributes:
        input_ids: Token ids.
        num_prompt_tokens: How many of them, from the start, are the prompt.
        excluded_spans: Where tokens after the prompt are no response, as where a user speaks between two turns:
            `[start, end, start, end, ...]`, ascending, each end exclusive.
        location: Where the row comes from, such as `line 3 of train.jsonl`.
    """

    input_ids: Sequence[int]
    num_prompt_tokens: int
    excluded_spans: Sequence[int] = ()
    location: str = ""

    def response_labels(self) -> Iterator[tuple[int, int]]:
        """Start and end of each stretch of response tokens, as labels: label `i` is token `i + 1`."""
        bounds = [max(self.num_prompt_tokens, 1), *self.excluded_spans, len(self.input_ids)]
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            yield start - 1, max(end - 1, 0)  # an example may have no token at all

    @property
    def num_response_labels(self) -> int:
        """Labels that count in the loss: the response tokens, less one that has nothing before it."""
        if not len(self.excluded_spans):  # nearly always, for very many examples
            return max(len(self.input_ids) - max(self.num_prompt_tokens, 1), 0)
        return sum(max(end - start, 0) for start, end in self.response_labels())

    def learnt_whole(self) -> "Example":
        """The example with all of its tokens as the response."""
        return replace(self, num_prompt_tokens=0, excluded_spans=())

    def truncated(self, length: int) -> "Example":
        """The example without the tokens from position `length` on."""
        excluded_spans = [min(bound, length) for bound in self.excluded_spans]
        return replace(self, input_ids=self.input_ids[:length], excluded_spans=excluded_spans)


def check_length(num_tokens: int, num_positions: int | None) -> None:
    """Refuse a row longer than the model's positions, if these are limited. Its last token is only a label."""
    if num_positions is not None and num_tokens > num_positions + 1:
        raise SettingsError(
            f"The row has {num_tokens} tokens, but the model has only {num_positions} positions. Set `max_length` to "
            f"{num_positions + 1} at most, and `too_long` to drop or truncate."
        )
