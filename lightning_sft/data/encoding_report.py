"""What became of the rows of a split when they were tokenised, for the log and for statistics."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_sft.data.chat.notices import Notice
from lightning_sft.data.rows.bad_rows import BadRowCounts
from lightning_sft.errors import counted


@dataclass(frozen=True)
class CountedNotice:
    """Something to know of several rows: the notice of the first of them, and how many they are."""

    notice: Notice
    num_rows: int

    def in_words(self, num_rows: int) -> str:
        """What a user reads, if the data has so many rows."""
        return self.notice.in_words(f"{self.num_rows:,} of {num_rows:,} rows")


@dataclass(frozen=True)
class EncodingReport:
    """What became of rows.

    Attributes:
        num_rows: Rows of which there are examples.
        num_examples: Examples that are used.
        num_dropped: Examples that are left out, since they are too long.
        num_too_long: Rows of which all examples are left out for that.
        num_truncated: Examples that are cut.
        bad_rows: Rows that are left out, since they are malformed, counted by what is wrong with them.
        unused_columns: Columns of rows that people mean to be used, and that are not.
        notices: What is to be known of conversations, a notice of each kind.
    """

    num_rows: int
    num_examples: int
    num_dropped: int = 0
    num_too_long: int = 0
    num_truncated: int = 0
    bad_rows: BadRowCounts = field(default_factory=BadRowCounts)
    unused_columns: Sequence[str] = ()
    notices: Sequence[CountedNotice] = ()

    @property
    def counts_examples(self) -> bool:
        """Whether some row became several examples, left out or not: then a number of examples is no number of rows."""
        return self.num_examples + self.num_dropped > self.num_rows + self.num_too_long

    @property
    def examples_in_words(self) -> str:
        """Why there are more examples than rows."""
        return (
            f"{counted(self.num_rows, 'row')} became {counted(self.num_examples, 'example')}, one for each turn, since "
            "the chat template writes a turn differently once others follow, or ends it without a special token. Each "
            'is learnt in the context of inference. `train_on_turns: "last"` learns only the last turns.'
        )


def count_notices(notices_of_rows: Iterable[tuple[int, Sequence[Notice]]]) -> list[CountedNotice]:
    """Count the rows that notices of each kind are about, given the notices of each example with its row's number."""
    first: dict[str, Notice] = {}
    counts: Counter[str] = Counter()
    seen: set[tuple[int, str]] = set()
    for row, notices in notices_of_rows:
        for notice in notices:
            first.setdefault(notice.kind, notice)
            if (row, notice.kind) not in seen:
                seen.add((row, notice.kind))
                counts[notice.kind] += 1
    return [CountedNotice(notice, counts[kind]) for kind, notice in first.items()]
