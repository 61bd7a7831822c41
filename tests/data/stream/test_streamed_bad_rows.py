"""Malformed rows of a stream: the steps are those of the other rows, and what is left out is told as it goes."""

import json
from itertools import islice

import pytest
import torch
from support.models import character_tokenizer
from support.runs import ROWS, read_log, train

from lightning_sft import SFTDataModule
from lightning_sft.data.encoding import Encoding, RowEncoder
from lightning_sft.data.rows.row_format import RowFormat
from lightning_sft.data.steps.plan import StepRule
from lightning_sft.data.steps.step_loader import LoaderOptions
from lightning_sft.data.streamed_rows import StreamedRows

BAD = ['{"prompt": "x"}\n', "no row\n", '{"prompt": "x", "output": 3}\n']


def write(path, rows):
    """The rows, and one of each bad kind after every fifth of them."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(line + ("".join(BAD) if number % 5 == 4 else "") for number, line in enumerate(lines)))
    return str(path)


def steps(path, num_steps, **options):
    options = {"streaming": True, "batch_size": 8, "shuffle_buffer": 1, "bad_rows": "drop"} | options
    data = SFTDataModule(character_tokenizer(), path, **options)
    data.setup("fit")
    found = islice(data.train_dataloader(), num_steps)
    return [[microbatch.input_ids.tolist() for microbatch in step.microbatches] for step in found]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_steps_are_those_of_the_good_rows(tmp_path, num_workers):
    good = tmp_path / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert steps(path, 12, num_workers=num_workers) == steps(str(good), 12, bad_rows="error")
    with pytest.raises(ValueError, match=r"^line 6 of .*rows.jsonl: no value for `output`"):
        steps(path, 12, bad_rows="error")


def test_a_stopped_run_goes_on_exactly(tmp_path):
    data = {"train_data": write(tmp_path / "rows.jsonl", ROWS), "streaming": True, "shuffle_buffer": 10}
    data |= {"bad_rows": "drop", "val_data": ROWS[:5]}
    options = {"module": {"lr_scheduler": "constant_with_warmup"}, "val_check_interval": 4}
    straight = train(tmp_path / "straight", data=data, **options, max_steps=12)
    for max_steps in (4, 9, 12):
        resumed = train(tmp_path / "parts", data=data, **options, max_steps=max_steps)
    assert read_log(tmp_path / "parts" / "steps_0.jsonl") == read_log(tmp_path / "straight" / "steps_0.jsonl")
    torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_first_of_each_kind_is_told_and_how_many_there_are(tmp_path, num_workers, caplog):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]) + "\n"
    path.write_text(good * 999 + BAD[0] + good * 10 + BAD[0] * 3 + BAD[1] * 97 + good * 100)
    steps(str(path), 160, num_workers=num_workers)
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == [
        "train_data, first 1,000 rows: left out 1 of 1,000 rows that cannot be used (`bad_rows` is 'drop').\n"
        "  1 row, line 1000: no value for `output` (`output_field`). The row has ['prompt'].",
        f"train_data: left out line 1014 of {path}: not valid JSON (Expecting value at column 1): 'no row\\n'",
        "train_data: left out 10 rows so far that cannot be used.\n"
        f"  6 rows such as line 1014 of {path}: not valid JSON (Expecting value at column 1): 'no row\\n'\n"
        f"  4 rows such as line 1000 of {path}: no value for `output` (`output_field`). The row has ['prompt'].",
        told[3],
    ]
    assert told[3].startswith("train_data: left out 100 rows so far that cannot be used.\n  96 rows such as line 1014")


def test_a_stream_of_bad_rows_is_an_error_with_the_reasons(tmp_path):
    path = write(tmp_path / "rows.jsonl", [])
    (tmp_path / "bad.jsonl").write_text(BAD[0] * 3)
    with pytest.raises(
        ValueError, match=r"^`train_data`, first 1,000 rows: no row can be used. 3 rows such as line 1: no"
    ):
        steps(str(tmp_path / "bad.jsonl"), 1)

    path = write(tmp_path / "rows.jsonl", ROWS[:5])
    encoder = RowEncoder(RowFormat(), character_tokenizer(), Encoding(bad_rows="drop"))
    rows = StreamedRows(path, encoder, StepRule(8), rows_per_block=10)
    encoder.row_format = RowFormat(output_field="answer")  # as if later rows were other ones
    with pytest.raises(ValueError, match=r"^`train_data`: no row can be used. .* no value for `answer`"):
        next(iter(rows.loader(None, None, LoaderOptions(character_tokenizer()))))
