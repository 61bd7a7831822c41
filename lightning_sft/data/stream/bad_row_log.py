"""What is said of streamed rows that are left out, while training goes on."""

from collections.abc import Iterable

from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.data.rows.bad_rows import BadRow, BadRowCounts


class BadRowLog:
    """Says which rows of a stream are left out: the first of each kind, and how many whenever they are ten times more.

    What is wrong with the rows of `known` has been said already.
    """

    def __init__(self, argument: str, known: BadRowCounts) -> None:
        self._argument = argument
        self._kinds = {each.first.kind for each in known.counted}
        self._counts, self._next_total = BadRowCounts(), 10

    def add(self, rows: Iterable[BadRow]) -> None:
        """Count rows that are left out."""
        for row in rows:
            self._counts.add(row)
            if row.kind not in self._kinds:
                self._kinds.add(row.kind)
                rank_zero_info(f"{self._argument}: left out {row.location}: {row.problem}")
            if self._counts.total == self._next_total:
                self._next_total *= 10
                words = f"{self._argument}: left out {self._counts.total:,} rows so far{self._counts.reason}."
                rank_zero_info("\n  ".join([words, *self._counts.in_words()]))
