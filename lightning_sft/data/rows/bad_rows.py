"""Rows that cannot be used: an error, or left out and counted by what is wrong with them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from lightning_sft.errors import SettingsError

BadRows = Literal["error", "drop"]

_NUM_KINDS_NAMED = 5  # in one message


class FilteredRowError(SettingsError):
    """Nothing is wrong with a row, but it is not to be used."""

    def __init__(self) -> None:
        super().__init__("`row_filter` leaves it out")


@dataclass(frozen=True)
class BadRow:
    """A row that is left out: where it comes from, such as `line 3 of train.jsonl`, and why it cannot be used."""

    location: str
    problem: str

    @property
    def kind(self) -> str:
        """The same for all rows of which the same is wrong.

        That is the problem without its numbers, up to the first value that it shows: such a value is in quotes or
        brackets.
        """
        return re.split(r"['\"\[{]", re.sub(r"\d+", "#", self.problem), maxsplit=1)[0]


@dataclass
class RowProblems:
    """What is wrong with rows: raised at once, or kept, as `on_bad_row` says.

    Attributes:
        found: The bad rows by their numbers, each with the first problem that it has.
    """

    on_bad_row: BadRows
    found: dict[int, BadRow] = field(default_factory=dict)

    @contextmanager
    def caught(self, number: int, location: str) -> Iterator[None]:
        """Whatever is wrong within is wrong with this row: raised, or kept. A row that is filtered is no error."""
        try:
            yield
        except SettingsError as error:
            if self.on_bad_row == "error" and not isinstance(error, FilteredRowError):
                raise SettingsError(f"{location}: {error}") from error.__cause__
            self.found.setdefault(number, BadRow(location, str(error)))


class BadRowCounts:
    """Bad rows, counted by what is wrong with them."""

    def __init__(self, rows: Iterable[BadRow] = ()) -> None:
        self._first: dict[str, BadRow] = {}
        self._counts: Counter[str] = Counter()
        for row in rows:
            self.add(row)

    def add(self, row: BadRow) -> None:
        """Count one more."""
        self._first.setdefault(row.kind, row)
        self._counts[row.kind] += 1

    @property
    def counted(self) -> dict[BadRow, int]:
        """The first row of each kind with the number of such rows, the most frequent first."""
        return {self._first[kind]: num_rows for kind, num_rows in self._counts.most_common()}

    @property
    def total(self) -> int:
        """How many rows there are."""
        return self._counts.total()

    @property
    def reason(self) -> str:
        """Why rows are left out, to follow the word "rows"; empty if some were filtered."""
        filtered = str(FilteredRowError())
        return "" if any(row.problem == filtered for row in self.counted) else " that cannot be used"

    def in_words(self) -> list[str]:
        """A sentence for each of the most frequent kinds, and one for all others."""
        sentences, others = [], self.total
        for first, num_rows in list(self.counted.items())[:_NUM_KINDS_NAMED]:
            rows = f"{num_rows:,} rows such as" if num_rows > 1 else "1 row,"
            sentences.append(f"{rows} {first.location}: {first.problem}")
            others -= num_rows
        return [*sentences, f"{others:,} more rows for other reasons."] if others else sentences
