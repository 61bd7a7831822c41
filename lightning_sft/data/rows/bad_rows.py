"""Rows that cannot be used: an error, or left out and counted by what is wrong with them."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
        """Whatever is wrong within is wrong with this row.

        Raises:
            SettingsError: If bad rows are errors; the message begins with the location. Filtered ones never are.
        """
        try:
            yield
        except SettingsError as error:
            if self.on_bad_row == "error" and not isinstance(error, FilteredRowError):
                raise SettingsError(f"{location}: {error}") from error.__cause__
            self.found.setdefault(number, BadRow(location, str(error)))


@dataclass(frozen=True)
class CountedBadRows:
    """Rows of which the same is wrong: the first of them, and how many they are."""

    first: BadRow
    num_rows: int

    def __str__(self) -> str:
        rows = f"{self.num_rows:,} rows such as" if self.num_rows > 1 else "1 row,"
        return f"{rows} {self.first.location}: {self.first.problem}"


class BadRowCounts:
    """Bad rows, counted by what is wrong with them."""

    def __init__(self, rows: Iterable[BadRow] = ()) -> None:
        self._counted: dict[str, CountedBadRows] = {}
        for row in rows:
            self.add(row)

    def add(self, row: BadRow) -> None:
        """Count one more."""
        counted = self._counted.get(row.kind, CountedBadRows(row, 0))
        self._counted[row.kind] = replace(counted, num_rows=counted.num_rows + 1)

    @property
    def counted(self) -> list[CountedBadRows]:
        """The kinds, the most frequent first."""
        return sorted(self._counted.values(), key=lambda each: -each.num_rows)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return sum(each.num_rows for each in self._counted.values())

    @property
    def reason(self) -> str:
        """Why rows are left out, to follow the word "rows"; empty if some were filtered."""
        filtered = str(FilteredRowError())
        return "" if any(each.first.problem == filtered for each in self.counted) else " that cannot be used"

    def in_words(self) -> list[str]:
        """A sentence for each of the most frequent kinds, and one for all others."""
        counted = self.counted
        others = sum(each.num_rows for each in counted[_NUM_KINDS_NAMED:])
        more = [f"{others:,} more rows for other reasons."] if others else []
        return [*map(str, counted[:_NUM_KINDS_NAMED]), *more]
