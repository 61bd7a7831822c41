"""Rows read while training: the steps of rows prepared before, the same on any number of processes, and resumed."""

import gzip
import json
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.models import character_tokenizer
from support.rows import in_memory, json_lines, write_compressed
from support.rows import write as write_text
from support.runs import ROWS, read_log, train

from lightning_sft import SFTDataModule
from lightning_sft.data.encoding import Encoding, RowEncoder
from lightning_sft.data.rows.row_format import RowFormat
from lightning_sft.data.steps.plan import StepRule
from lightning_sft.data.steps.step_loader import LoaderOptions
from lightning_sft.data.stream.row_stream import open_streams
from lightning_sft.data.stream.stream_order import StreamPosition, ordered_rows
from lightning_sft.data.stream.streamed_steps import hash_of_examples
from lightning_sft.data.streamed_rows import StreamedRows
from lightning_sft.data.tokens.example import Example

LONG = {"prompt": "long", "output": "x" * 100}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(rows, delimiter):
    return b"".join(row["prompt"].encode() + delimiter + row["output"].encode() + b"\n" for row in rows)


def streamed(path, **options):
    data = SFTDataModule(character_tokenizer(), path, **({"streaming": True, "batch_size": 8} | options))
    data.setup("fit")
    return data


def test_in_the_order_of_the_data_a_run_is_that_of_prepared_rows(tmp_path):
    """40 rows are 5 steps, which both runs take twice; `overfit_batches` keeps prepared rows in their order."""
    path = write(tmp_path / "rows.jsonl", ROWS[:40])
    prepared = train(tmp_path / "prepared", data={"train_data": path}, max_steps=10, overfit_batches=5)
    data = {"train_data": path, "streaming": True, "shuffle_buffer": 1, "num_workers": 1}
    result = train(tmp_path / "streamed", data=data, max_steps=10)
    assert result["losses"] == prepared["losses"]
    assert len(result["losses"]) == 10
    torch.testing.assert_close(result["weights"], prepared["weights"], rtol=0, atol=0)
    steps = read_log(tmp_path / "streamed" / "steps_0.jsonl")
    assert steps[0]["rows"] == sorted(f"line {number}" for number in range(1, 9))
    assert steps[5]["rows"] == steps[0]["rows"]


def test_ranks_share_the_step_that_one_rank_has(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, LONG])
    encoder = RowEncoder(RowFormat(), character_tokenizer(), Encoding(max_length=40, too_long="drop"))
    rows = StreamedRows(path, encoder, StepRule(8, max_tokens_per_microbatch=40), rows_per_block=9)

    def steps(rank, world_size):
        options = LoaderOptions(character_tokenizer(), "packed", rank, world_size)
        return list(rows.loader(None, range(12), options))

    one, ranks = steps(0, 1), [steps(rank, 3) for rank in range(3)]
    for step, *parts in zip(one, *ranks, strict=True):
        assert sorted(row for part in parts for row in part.locations) == sorted(step.locations)
        assert len(step.locations) == step.totals.num_sequences == 8
        tokens = sum(m.input_ids.numel() for part in parts for m in part.microbatches if m.num_sequences)
        for part in parts:
            assert len(part.microbatches) == len(parts[0].microbatches)
            assert part.totals == step.totals
        assert tokens == step.totals.num_tokens


def test_a_pass_has_every_row_once_and_the_next_another_order(tmp_path):
    loader = streamed(write(tmp_path / "rows.jsonl", ROWS[:40]), shuffle_buffer=16).train_dataloader()
    steps = [batch.locations for batch in islice(loader, 10)]
    first, second = ([row for step in steps[at : at + 5] for row in step] for at in (0, 5))
    assert sorted(first) == sorted(second) == sorted(f"line {number}" for number in range(1, 41))
    assert [set(step) for step in steps[:5]] != [set(step) for step in steps[5:]]
    assert {int(row.split()[1]) for row in first[:16]} == set(range(1, 17))  # a buffer after the other
    assert steps == [batch.locations for batch in islice(loader, 10)]


def in_parts(folder, rows):
    for part in range(2):
        write(folder / f"{part}.jsonl", rows[part * 6 : part * 6 + 6])
    return str(folder)


def several(folder, rows):
    return [write(folder / "more.jsonl", rows[:1]), write(folder / "rows.jsonl", rows), str(folder / "more.jsonl")]


def saved(folder, rows):
    Dataset.from_list(rows).save_to_disk(str(folder))
    return str(folder)


def parquet(path, rows):
    Dataset.from_list(rows).to_parquet(path, batch_size=3)
    return str(path)


KINDS = {
    "JSONL": lambda folder, rows: write(folder / "rows.jsonl", rows),
    "JSON": lambda folder, rows: write_text(folder / "rows.json", json.dumps(rows)),
    "CSV": lambda folder, rows: write_text(folder / "rows.csv", b"prompt,output\n" + table(rows, b",")),
    "TSV in bzip2": lambda folder, rows: write_compressed(
        folder / "rows.tsv.bz2", b"prompt\toutput\n" + table(rows, b"\t")
    ),
    "JSONL in Zstandard": lambda folder, rows: write_compressed(folder / "rows.jsonl.zst", json_lines(*rows)),
    "Parquet": lambda folder, rows: parquet(folder / "rows.parquet", rows),
    "folder": in_parts,
    "saved": saved,
    "several": several,
    "CSV in gzip behind an address": lambda folder, rows: in_memory(
        f"{folder.name}/rows.csv.gz", gzip.compress(b"prompt,output\n" + table(rows, b","))
    ),
    "Parquet behind an address": lambda folder, rows: parquet(f"memory://{folder.name}/rows.parquet", rows),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_any_place_on_the_rows_are_the_same(tmp_path, kind):
    rows = [{"prompt": f"{i}", "output": "x"} for i in range(11)]
    data = KINDS[kind](tmp_path, rows)
    streams = open_streams(data, "train_data")
    straight = list(islice(ordered_rows(streams, 4, 0, StreamPosition()), 40))
    size = 13 if kind == "several" else 11
    assert len({each.location for each in straight[:size]}) == (12 if kind == "several" else 11)
    found, position = [], StreamPosition()
    while len(found) < 40:
        position = StreamPosition.from_values(json.loads(json.dumps(asdict(position))))
        found += list(islice(ordered_rows(streams, 4, 0, position), 3))
        position = found[-1].after
    assert [(each.location, each.row) for each in found[:40]] == [(each.location, each.row) for each in straight]


def test_a_run_goes_on_as_if_nothing_had_happened_and_not_with_other_rows(tmp_path):
    first, second = write(tmp_path / "a.jsonl", ROWS[:21]), write(tmp_path / "b.jsonl", [*ROWS[21:], LONG])
    data = {"train_data": [first, second], "streaming": True, "shuffle_buffer": 10}
    data |= {"max_length": 50, "too_long": "drop", "val_data": ROWS[:5], "gradient_accumulation_steps": 2}
    options = {"module": {"lr_scheduler": "constant_with_warmup"}, "val_check_interval": 4}
    straight = train(tmp_path / "straight", data=data, **options, max_steps=15)
    train(tmp_path / "parts", data=data | {"num_workers": 1}, **options, max_steps=4)
    for changed, message in (
        ({"shuffle_buffer": 11}, "`shuffle_buffer` = 10, now it is 11"),
        ({"streaming": False, "shuffle_buffer": 10_000}, "`streaming` = True, now it is False"),
        ({"max_length": 10}, "other training rows or tokens: the run cannot continue"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "parts", data=data | changed, **options, max_steps=15)
    train(tmp_path / "parts", data=data | {"num_workers": 1}, **options, max_steps=9)
    resumed = train(tmp_path / "parts", data=data, **options, max_steps=15)
    assert read_log(tmp_path / "parts" / "steps_0.jsonl") == read_log(tmp_path / "straight" / "steps_0.jsonl")
    torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=0, atol=0)


def test_switches_of_the_trainer_count_steps(tmp_path):
    """Two steps of `fast_dev_run`; the data starts over after three; prompts are the first training rows."""
    data = {"train_data": write(tmp_path / "rows.jsonl", ROWS), "streaming": True, "shuffle_buffer": 1}
    train(tmp_path / "dev", data=data, fast_dev_run=2, generate=True)
    assert len(read_log(tmp_path / "dev" / "steps_0.jsonl")) == 2
    train(tmp_path / "limit", data=data, max_steps=7, limit_train_batches=3, generate=True)
    rows = [line["rows"] for line in read_log(tmp_path / "limit" / "steps_0.jsonl")]
    assert rows[0] == rows[3] == rows[6]
    records = (tmp_path / "limit" / "generations" / "step_0.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in records] == [row["prompt"] for row in ROWS[:3]]


def test_preview_shows_the_first_rows_and_the_card_says_that_data_was_streamed(tmp_path):
    data = streamed(write(tmp_path / "rows.jsonl", [LONG, *ROWS]), val_data=ROWS[:2], max_length=90, too_long="drop")
    text = " ".join(str(data.preview(1)).split())
    assert text.startswith("line 2: ")
    assert "first 1,000 rows val rows 43 2 dropped, longer than `max_length` = 90 tokens 1 0" in text
    facts = data.facts()["data"]
    assert (facts["train"], facts["val rows"]) == ("rows.jsonl, streamed", 2)
    assert "train rows" not in facts


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_row_is_named_when_it_is_read(tmp_path, num_workers):
    for line, message in {
        '{"prompt": "a", "output": 3}': r"line 1291 of .*rows.jsonl: `output` \(`output_field`\) is 3 of type int",
        '{"prompt"': r"line 1291 of .*rows.jsonl: not valid JSON",
    }.items():
        path = write(tmp_path / "rows.jsonl", ROWS * 30)
        with open(path, "a") as file:
            file.write(line)
        loader = iter(streamed(path, batch_size=258, num_workers=num_workers, shuffle_buffer=1).train_dataloader())
        assert len(list(islice(loader, 5))) == 5
        with pytest.raises(ValueError, match="^" + message):
            next(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 2}, "`num_workers` is 2, expected 0 or 1 with `streaming`"),
        ({"val_fraction": 0.1}, "`val_fraction` is 0.1, but with `streaming` the number"),
        ({"train_data": {"a.jsonl": 2}}, "`train_data` has weights, but with `streaming` the number"),
        ({"train_data": ROWS}, r"`train_data` is .* of type list; with `streaming` expected a file, a data set's name"),
        ({"train_data": "none.jsonl"}, "`train_data` is 'none.jsonl', but there is no such file"),
        ({"shuffle_buffer": 0}, "`shuffle_buffer` is 0, expected at least 1"),
        ({"streaming": 1}, "`streaming` is 1 of type int, expected true or false"),
        (
            {"max_length": 4, "too_long": "drop"},
            "first 1,000 rows: all 43 rows are longer than `max_length` = 4 tokens",
        ),
        ({"max_tokens_per_microbatch": 9}, "`max_tokens_per_microbatch` is 9, but example"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        streamed(**({"path": write(tmp_path / "a.jsonl", ROWS)} | rename(options)))


def rename(options):
    return {{"train_data": "path"}.get(name, name): value for name, value in options.items()}


def test_a_stream_needs_a_number_of_steps(tmp_path):
    data = {"train_data": write(tmp_path / "a.jsonl", ROWS), "streaming": True}
    with pytest.raises(ValueError, match=r"`trainer.max_steps` is -1, but `streaming` needs the number of optimizer"):
        train(tmp_path, data=data, max_steps=-1, max_epochs=2)
    with pytest.raises(ValueError, match=r"`trainer.limit_train_batches` is 0.5, but with `streaming` the length"):
        train(tmp_path, data=data, limit_train_batches=0.5)


def test_when_all_later_rows_are_too_long_it_is_an_error_and_not_an_endless_search(tmp_path):
    encoder = RowEncoder(RowFormat(), character_tokenizer(), Encoding(max_length=90, too_long="drop"))
    rows = StreamedRows(write(tmp_path / "a.jsonl", ROWS), encoder, StepRule(8), rows_per_block=10)
    encoder.encoding = Encoding(max_length=4, too_long="drop")  # as if later rows were longer
    loader = rows.loader(None, None, LoaderOptions(character_tokenizer()))
    with pytest.raises(ValueError, match="`train_data`: all rows are longer than `max_length` = 4 tokens"):
        next(iter(loader))


def test_the_hash_of_examples_changes_with_their_tokens_their_order_and_what_is_learnt():
    first, second = Example([1, 2, 3], 1), Example([4, 5, 6, 7], 2)
    other_mask, excluded = replace(first, num_prompt_tokens=2), replace(first, excluded_spans=[2, 3])
    cases = [[first, second], [second, first], [first], [other_mask, second], [excluded, second]]
    cases.append([Example([1, 2, 3, 4], 1), Example([5, 6, 7], 2)])
    hashes = [hash_of_examples(case) for case in cases]
    assert len(set(hashes)) == len(cases)
    arrays = [replace(each, input_ids=np.asarray(each.input_ids, np.int32), location="line 1") for each in cases[0]]
    assert hash_of_examples(arrays) == hashes[0]
