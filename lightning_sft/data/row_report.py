"""What is said of rows when they are loaded or streamed: what became of them, and what nothing uses."""

from collections.abc import Iterable, Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sft.data.encoded_rows import EncodedRows, read_numbers
from lightning_sft.data.encoding import RowEncoder
from lightning_sft.data.rows.bad_rows import BadRow, BadRowCounts
from lightning_sft.data.rows.columns import unused_in_words
from lightning_sft.data.rows.prompt_rows import PromptRows
from lightning_sft.data.rows.sources import Source
from lightning_sft.errors import SettingsError, counted

_NUM_SOURCES_NAMED = 20  # in one message


def report_rows(
    argument: str, rows: EncodedRows, encoder: RowEncoder, sources: Sequence[Source] = (), part: str = ""
) -> None:
    """Say what became of the rows of an argument, or of a part (`, first 1,000 rows`); refused if nothing is left."""
    report, title, limit = rows.report, f"{argument}{part}", encoder.encoding.limit_in_words
    if not report.num_examples:
        raise nothing_left(f"`{argument}`{part}", report.bad_rows, limit, report.num_too_long)
    _report_bad_rows(title, report.bad_rows, report.bad_rows.total + report.num_rows + report.num_too_long)
    of_all = f"of {counted(report.num_examples + report.num_dropped, 'example' if report.counts_examples else 'row')}"
    if report.num_dropped:
        lost = zip(sources, rows.sizes, rows.num_dropped, strict=False)
        each = ", ".join(f"{num} of {num + size} of {source.name}" for source, size, num in lost if num)
        each = f" ({each})" if 1 < len(sources) <= _NUM_SOURCES_NAMED else ""
        rank_zero_info(f"{title}: dropped {report.num_dropped:,} {of_all}{each}, {limit}.")
    if report.num_truncated:
        rank_zero_info(
            f"{title}: truncated {report.num_truncated:,} {of_all}, {limit}; their responses lose the end and the EOS."
        )
    if report.num_examples > report.num_rows:
        rank_zero_info(
            f"{title}: {counted(report.num_rows, 'row')} became {counted(report.num_examples, 'example')}, one for "
            "each turn, since the chat template writes a turn differently once others follow, or ends it without a "
            "special token. Each is learnt in the context of inference. "
            '`train_on_turns: "last"` learns only the last turns.'
        )
    for notice, num_rows in report.notices.items():
        say = rank_zero_warn if notice.is_warning else rank_zero_info
        say(f"{title}: {notice.in_words(f'{num_rows:,} of {report.num_rows:,} rows')}")
    _warn_of_unused_columns(title, report.unused_columns)
    _warn_without_conversations(title, rows, encoder.row_format.settings_of_conversations())


def report_prompts(argument: str, prompts: PromptRows) -> None:
    """Say what became of the rows of an argument that a model is to continue; refused if nothing is left."""
    if not prompts.prompts:
        raise nothing_left(f"`{argument}`", prompts.bad_rows)
    _report_bad_rows(argument, prompts.bad_rows, prompts.bad_rows.total + len(prompts.prompts))
    _warn_of_unused_columns(argument, prompts.unused_columns)


class BadRowLog:
    """Says which rows of a stream are left out: the first of each kind, and how many whenever they are ten times more.

    What is wrong with the rows of `known` has been said already.
    """

    def __init__(self, argument: str, known: BadRowCounts) -> None:
        self._argument = argument
        self._kinds = {row.kind for row in known.counted}
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


def nothing_left(title: str, bad_rows: BadRowCounts, limit: str = "", num_too_long: int | None = None) -> SettingsError:
    """The error that no row can be used: some are bad, others longer than a limit (so many, if it is known)."""
    if not bad_rows.total:
        rows = "all rows are" if num_too_long is None else f"all {num_too_long:,} rows are"
        rows = "its only row is" if num_too_long == 1 else rows
        return SettingsError(f"{title}: {rows} {limit}. Raise `max_length`.")
    too_long = [f"Rows {limit}: {num_too_long:,}."] if num_too_long else []
    return SettingsError(f"{title}: no row can be used. {' '.join([*bad_rows.in_words(), *too_long])}")


def _report_bad_rows(title: str, bad_rows: BadRowCounts, num_rows: int) -> None:
    if bad_rows.total:
        reason = f"{bad_rows.reason} (`bad_rows` is 'drop')" if bad_rows.reason else ""
        words = f"{title}: left out {bad_rows.total:,} of {counted(num_rows, 'row')}{reason}."
        rank_zero_info("\n  ".join([words, *bad_rows.in_words()]))


def _warn_of_unused_columns(title: str, columns: Sequence[str]) -> None:
    if columns:
        rank_zero_warn(f"{title}: {unused_in_words(columns)}")


def _warn_without_conversations(title: str, rows: EncodedRows, settings: Sequence[str]) -> None:
    if settings and not read_numbers(rows.dataset, "as_written").any():
        names = " and ".join(f"`{name}`" for name in settings)
        rank_zero_warn(
            f"{title}: no row is a conversation, which {names} would need. `as_chat: true` makes conversations of "
            "prompts and outputs."
        )
