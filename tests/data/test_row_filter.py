"""Rows that a function leaves out: as if they had never been there."""

import json
from itertools import chain, islice

import pytest
from support.models import character_tokenizer

from lightning_sft import SFTDataModule
from lightning_sft.errors import SettingsError, SettingsTypeError

ROWS = [{"prompt": f"{i}", "output": "abc"[: 1 + i % 3] * (1 + i % 4), "level": i % 5} for i in range(40)]


def is_easy(row):
    return row["level"] < 2


def upper(row):
    return {"prompt": row["prompt"], "output": row["output"].upper()}  # without its level: a filter comes first


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(rows, **options):
    data = SFTDataModule(character_tokenizer(), rows, batch_size=4, row_transform=upper, **options)
    data.setup("fit")
    return data


def steps(data):
    """The sequences of each of the first four optimizer steps, which are an epoch of the easy rows."""
    made = [step.microbatches for step in islice(iter(data.train_dataloader()), 4)]
    return [
        [ids[:length].tolist() for each in step for ids, length in zip(each.input_ids, each.lengths, strict=True)]
        for step in made
    ]


def test_steps_are_those_of_the_rows_filtered_beforehand():
    assert steps(made(ROWS, row_filter=is_easy)) == steps(made(list(filter(is_easy, ROWS))))


def test_a_stream_has_the_rows_filtered_beforehand(tmp_path):
    stream = made(write(tmp_path / "rows.jsonl", ROWS), row_filter=is_easy, streaming=True, shuffle_buffer=5)
    given, expected = (sorted(chain(*steps(data))) for data in (stream, made(list(filter(is_easy, ROWS)))))
    assert given == expected


def test_how_many_rows_are_left_out_is_said_although_none_is_bad(tmp_path, caplog):
    with caplog.at_level("INFO"):
        data = made(ROWS, val_data=ROWS[:5], row_filter=is_easy, bad_rows="error")
    assert "train_data: left out 24 of 40 rows.\n  24 rows such as row 3" in caplog.text
    assert "`row_filter` leaves it out" in caplog.text
    assert [prompt.text for prompt in data.prompts("validate")] == ["0", "1"]


def test_a_filter_that_leaves_nothing_or_fails_is_an_error():
    with pytest.raises(SettingsError, match=r"no row can be used. 40 rows such as row 1.*`row_filter` leaves it out"):
        made(ROWS, row_filter=lambda row: None)
    with pytest.raises(SettingsError, match=r"row 1.*: `row_filter` failed: KeyError: 'hardness'"):
        made(ROWS, row_filter=lambda row: row["hardness"] > 1)
    with pytest.raises(SettingsTypeError, match="`row_filter` is 'easy', expected a function"):
        made(ROWS, row_filter="easy")


def test_a_filter_does_not_change_the_row():
    def taking(row):
        return row.pop("level") < 2

    assert len(made(ROWS, row_filter=taking).training_rows.plan(1).step(0, "packed").ranks) == 1
    assert all("level" in row for row in ROWS)
