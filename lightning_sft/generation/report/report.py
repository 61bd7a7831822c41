"""Everything that shows the generation records of one step: files, pages, terminal and loggers."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import Logger

from lightning_sft.generation.records import GenerationRecord, summarize, summarize_test, write_records
from lightning_sft.generation.report.loggers import log_records
from lightning_sft.generation.report.page import update_index, write_page
from lightning_sft.generation.report.terminal import print_records, print_summary, print_test_result, warn_of_failures

Stage = Literal["fit", "validate", "test"]

_RECORDS_WITH_TOKENS = 500  # in memory, and on the page
_ROWS_IN_TERMINAL = 3


class GenerationReport:
    """Takes the records of one step, part by part, and shows them wherever somebody may look.

    Args:
        stage: `fit`, `validate` or `test`. The records of `test` get files of their own, which the index does not list.
        step: Optimizer steps done.
        folder: Where the files and pages go. None: this process writes none.
    """

    def __init__(self, stage: Stage, step: int, folder: Path | None) -> None:
        self._stage, self._step, self._folder = stage, step, folder
        self._name = f"test_step_{step}" if stage == "test" else f"step_{step}"
        self._records: list[GenerationRecord] = []

    def add(self, records: Sequence[GenerationRecord]) -> None:
        """Write records to their file. Beyond the first 500 they lose their tokens, which take most of the memory."""
        if self._folder is not None:
            path = self._folder / f"{self._name}.jsonl"
            write_records(path, records, "a" if self._records else "w", step=self._step)
        for record in records[max(_RECORDS_WITH_TOKENS - len(self._records), 0) :]:
            record.drop_tokens()
        self._records.extend(records)

    def summary(self) -> dict[str, float]:
        """What all records add up to."""
        of_test = summarize_test(self._records) if self._stage == "test" else {}
        return summarize(self._records) | of_test

    def show(
        self, summary: dict[str, float], cost: dict[str, float], loggers: Sequence[Logger], num_rows_shown: int
    ) -> None:
        """Show all records in the terminal, in loggers and on a page.

        In training the loggers also get the numbers of `summary` and `cost`; otherwise Lightning passes these on.
        """
        print_summary(self._step, summary | cost)
        if self._stage == "test":
            print_test_result(summary)
        print_records(self._records[:_ROWS_IN_TERMINAL])
        warn_of_failures(self._records)
        metrics = {f"val/{name}": value for name, value in (summary | cost).items() if not math.isnan(value)}
        for logger in loggers:
            log_records(logger, self._step, self._records, num_rows_shown)
            if self._stage == "fit":
                logger.log_metrics(metrics, self._step)
        if self._folder is not None:
            self._write_pages(self._folder, summary)

    def _write_pages(self, folder: Path, summary: dict[str, float]) -> None:
        page, records = f"{self._name}.html", [record.to_json() for record in self._records[:_RECORDS_WITH_TOKENS]]
        title = f"Test at step {self._step}" if self._stage == "test" else f"Step {self._step}"
        write_page(folder / page, records, summary, title=title, num_records=len(self._records))
        if self._stage != "test":
            update_index(folder, self._step, page, summary)
