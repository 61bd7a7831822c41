"""Names and paths as model cards and loggers show them."""

from pathlib import Path

import pytest

from lightning_sft.data.rows.shown import shown_data, shown_path


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("rows/train.jsonl", "rows/train.jsonl"),
        ("/home/me/train.jsonl", "train.jsonl"),
        ("user/set@v1:main:train", "user/set@v1:main:train"),
        ("https://me:secret@host/a.jsonl?signature=1", "https://host/a.jsonl"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("hf://datasets/user/set@v1/a.jsonl", "hf://datasets/user/set@v1/a.jsonl"),
    ],
)
def test_folders_of_this_machine_and_secrets_of_addresses_are_left_out(path, shown):
    assert shown_path(path) == shown


def test_files_are_shown_by_their_names_be_they_texts_or_paths_and_rows_in_memory_have_none():
    assert shown_data(Path("/home/me/train.jsonl")) == "train.jsonl"
    assert shown_data([Path("a.jsonl"), "b.jsonl"]) == "a.jsonl, b.jsonl"
    assert shown_data([{"prompt": "a"}]) is None
