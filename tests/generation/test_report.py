"""Records in loggers and in the terminal."""

import io
import json

import rich.console
from lightning.pytorch.loggers import CSVLogger

from lightning_sft.generation.records import GenerationRecord
from lightning_sft.generation.report import report
from lightning_sft.generation.report.loggers import log_records, markdown_table
from lightning_sft.generation.report.terminal import print_records


def test_table_cells_are_escaped_and_long_texts_cut():
    unscored = GenerationRecord("p" * 700, "a|b\n<script>*x*", None, None, None, None, 0.5, 3, "eos")
    scored = GenerationRecord("p", "r", "g|h", 1.0, 0.0, 0.25, 0.5, 3, "length")
    _, header, rule, first, second = markdown_table([unscored, scored]).split("\n")
    assert {line.count("|") for line in (header, rule, first, second)} == {4}
    assert "a&#124;b<br>&#60;script&#62;&#42;x&#42;" in first
    assert "… " + "p" * 600 + " |" in first
    assert first.endswith("| 3 tokens; 0.500 nats; ended by eos |")
    assert "reward 0.25 (format 1, answer 0); expected g&#124;h; 3 tokens" in second


def test_a_logger_with_tables_gets_one():
    class Tables(CSVLogger):
        def log_table(self, key, columns=None, data=None, dataframe=None, step=None):  # as Weights & Biases' does
            self.table = (key, step, [dict(zip(columns, row, strict=True)) for row in data])

    logger = Tables("unused")
    records = [GenerationRecord(f"p{i}", "r", "g", 1.0, 0.0, 0.25, 0.5, 3, "eos") for i in range(3)]
    log_records(logger, 7, records, num_rows=2)
    key, step, rows = logger.table
    assert (key, step) == ("generations", 7)
    assert [row["prompt"] for row in rows] == ["p0", "p1"]
    assert rows[0]["reward"] == 0.25


def test_the_terminal_shows_a_small_table_and_other_outputs_nothing(monkeypatch):
    records = [GenerationRecord("p" * 300, "[red]r\n[/red]", "g", 1.0, 1.0, 0.25, 0.5, 37, "eos")]
    shown = {}
    for terminal in (True, False):
        console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
        monkeypatch.setattr(rich, "get_console", lambda console=console: console)
        print_records(records)
        shown[terminal] = console.file.getvalue()
    assert shown[False] == ""
    assert shown[True].count("p") == 80 + 4  # and those of the header
    for text in ("[red]r [/red]", "0.25", "37"):
        assert text in shown[True]


def test_only_the_first_records_keep_their_tokens_and_the_file_has_all(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_RECORDS_WITH_TOKENS", 3)
    records = [
        GenerationRecord("p", f"r{i}", "g", 1.0, 1.0, 1.0, 0.5, 1, "eos", index=i, tokens=[f"r{i}"]) for i in range(6)
    ]
    reported = report.GenerationReport("test", 7, tmp_path)
    for part in (records[:2], records[2:4], records[4:]):
        reported.add(part)
    assert [record.tokens for record in records] == [["r0"], ["r1"], ["r2"], [], [], []]
    lines = [json.loads(line) for line in (tmp_path / "test_step_7.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(7, [f"r{i}"]) for i in range(6)]
    assert reported.summary()["num_responses"] == 6
