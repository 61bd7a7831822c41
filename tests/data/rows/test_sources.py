"""Every kind of data gives the same rows; what cannot be read is named with the reason."""

from datetime import date

import fsspec
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, DatasetInfo, SplitDict, SplitInfo
from support.models import character_tokenizer
from support.rows import (
    DATA,
    ENCODED,
    ROWS,
    encode,
    encoded,
    folder_of_a_data_set,
    in_memory,
    json_lines,
    refusal,
    saved_splits,
    write,
    write_lines,
    write_parquet,
)

from lightning_sft import SettingsError, SFTDataModule
from lightning_sft.data.rows.named_sets import load_named
from lightning_sft.data.rows.readers import read_file
from lightning_sft.data.rows.sources import open_sources

pytestmark = pytest.mark.usefixtures("addresses")


@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data_gives_the_same_rows(tmp_path, kind):
    rows = encode(DATA[kind](tmp_path))
    assert encoded(rows) == ENCODED
    assert (rows.report.num_dropped, rows.report.num_truncated) == (0, 0)


def test_a_path_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "rows.jsonl", *ROWS)
    saved_splits(tmp_path)
    for data in ("~/rows.jsonl", "~/*.jsonl", "~/saved", "~/saved::test[1:]"):
        assert encoded(encode(data)) == ENCODED
    assert len(encode("~/saved::test").dataset) == 4
    character_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert SFTDataModule("~/tokenizer").tokenizer.name_or_path == str(tmp_path / "tokenizer")
    assert refusal("~/none.jsonl", FileNotFoundError) == "`train_data` is '~/none.jsonl', but there is no such file."


def test_a_file_behind_an_address_that_has_changed_is_read_anew():
    for rows in (ROWS, ROWS[1:]):
        data = in_memory("changing/rows.jsonl", json_lines(*rows))
        assert encode(data).dataset["prompt"][:] == [row["prompt"] for row in rows]


def test_a_file_of_a_hub_s_repository_is_not_copied_by_force(monkeypatch, tmp_path):
    """The hub tells whether it has changed, though by no ETag of the file; other addresses without one cannot."""
    write_lines(tmp_path / "rows.jsonl", *ROWS)
    forced = []

    class Copies:
        def __init__(self, download_config):
            forced.append(download_config.force_download)

        def download(self, path):
            return tmp_path / "rows.jsonl"

    class Files:
        def info(self, path):
            return {"name": path, "size": 3, "type": "file"}

    monkeypatch.setattr("lightning_sft.data.rows.files.DownloadManager", Copies)
    monkeypatch.setattr("lightning_sft.data.rows.files.url_to_fs", lambda name: (Files(), name))
    for name in ("hf://datasets/user/set/rows.jsonl", "hf://buckets/user/rows.jsonl", "s3://bucket/rows.jsonl"):
        assert encoded(encode(name)) == ENCODED
    assert forced == [False, True, True]


@pytest.mark.parametrize("name", ["2026-11-26T10:30", "run[1]", "rows.parquet"])
def test_a_folder_may_have_a_name_like_that_of_a_pattern_a_split_or_a_file(tmp_path, name):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / name / "saved[1].json"))
    for data in ("saved[1].json", "saved[1].json::train[:3]"):
        assert encoded(encode(str(tmp_path / name / data))) == ENCODED
    if "[" not in name:  # `datasets` takes this for a pattern itself
        write_parquet(tmp_path / name / "part-0.parquet", *ROWS)
        assert encoded(encode(str(tmp_path / name))) == ENCODED


def test_a_saved_folder_is_known_by_what_it_holds(tmp_path):
    """Even if its own identity stays the same, as that of a folder that was changed by hand."""
    for rows in (ROWS, ROWS[::-1]):
        data = Dataset.from_list(rows)
        data._fingerprint = "the same"
        data.save_to_disk(str(tmp_path / "saved"))
        assert encode(str(tmp_path / "saved")).dataset["prompt"][:] == [row["prompt"] for row in rows]


def test_the_lines_of_a_json_file_may_have_a_column_named_data(tmp_path):
    def transform(row):
        return row["data"][0]

    for rows in ([{"data": ROWS[:1]}, {"data": ROWS[1:]}], [{"data": ["a"]}]):
        path = write_lines(tmp_path / "rows.json", *rows)
        found = [row for _, row in read_file(path)]
        assert found == rows
    path = write_lines(tmp_path / "rows.json", {"data": ROWS[:1]}, {"data": ROWS[1:]})
    assert encode(path, row_transform=transform).dataset["prompt"][:] == ["Hi,", 'a\n"b"']


def test_columns_that_are_not_asked_for_may_hold_anything():
    extras = [None, 3, {"of": [date(2020, 1, 1)]}]
    assert encoded(encode([{"extra": extra} | row for row, extra in zip(ROWS, extras, strict=True)])) == ENCODED
    assert encoded(encode([ROWS[0] | {"only here": 1}, *ROWS[1:]])) == ENCODED


def test_the_rows_of_several_sources_stand_one_after_another(tmp_path):
    folder = folder_of_a_data_set(tmp_path)
    assert encode([f"{folder}::test", f"{folder}/train.parquet"]).dataset["prompt"][:] == [
        'a\n"b"',
        "12",
        *ENCODED["prompt"],
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", ("a/b", None, "train", None)),
        ("a/b:main:test", ("a/b", "main", "test", None)),
        ("a/b@v1.0:main:test[:10%]", ("a/b", "main", "test[:10%]", "v1.0")),
        ("a/b@v1.0::test", ("a/b", None, "test", "v1.0")),
    ],
)
def test_a_hub_name_has_configuration_split_and_revision(name, expected, monkeypatch):
    asked = []

    class Builder:
        def download_and_prepare(self):
            pass

        def as_dataset(self, split):
            asked.insert(2, split)
            return Dataset.from_list([{"prompt": "a", "output": "b"}])

    def load(path, config, *, revision):
        asked.extend([path, config, revision])
        return Builder()

    monkeypatch.setattr("lightning_sft.data.rows.named_sets.load_dataset_builder", load)
    open_sources(name, "train_data")
    assert tuple(asked) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_without_a_hub_the_cache_gives_the_revision_that_is_asked_for(tmp_path, monkeypatch, streaming):
    """Left alone, `datasets` gives whichever was used last."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    first, second = "1" * 40, "2" * 40
    for commit in (first, second):
        folder = tmp_path / "user___set" / "default" / "0.0.0" / commit
        rows = Dataset.from_list([{"prompt": commit, "output": "b"}])
        rows.save_to_disk(str(folder))
        (folder / "data-00000-of-00001.arrow").rename(folder / "set-train.arrow")
        splits = SplitDict.from_split_dict([SplitInfo("train", num_examples=1)], dataset_name="set")
        info = DatasetInfo("", features=rows.features, splits=splits, config_name="default", version="0.0.0")
        info.write_to_directory(str(folder))
    refs = tmp_path / "hub" / "datasets--user--set" / "refs"
    refs.mkdir(parents=True)
    for branch, commit in (("main", first), ("v2", second)):
        (refs / branch).write_text(commit)

    def prompt(name):
        return next(iter(load_named(name, "train_data", streaming=streaming)))["prompt"]

    assert [prompt(f"user/set{at}") for at in ("", "@v2", f"@{first}")] == [first, second, first]
    with pytest.raises(SettingsError, match=f"the cache has commit {second} of it, not v3. To use that, give the name"):
        prompt("user/set@v3")


def test_an_address_that_the_offline_mode_of_the_hub_forbids_says_so(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with fsspec.open("memory://forbidden.jsonl", "w") as file:
        file.write('{"prompt": "a", "output": "b"}')
    message = refusal("memory://forbidden.jsonl")
    assert message.endswith("Unset the environment variable `HF_HUB_OFFLINE`, or give a copy on this machine.")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "*.jsonl", "**/rows[0-9]*"])
def test_a_missing_file_and_a_pattern_without_match_are_named(tmp_path, name):
    message = refusal(str(tmp_path / name), FileNotFoundError)
    assert message == f"`train_data` is '{tmp_path / name}', but there is no such file."


@pytest.mark.parametrize("name", ["rows.txt", "rows.JSONL", "rows"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    for data in (write(tmp_path / name, '{"prompt": "a", "output": "b"}'), str(tmp_path / "row*")):
        message = refusal(data)
        assert message == (
            f"`train_data` is '{tmp_path / name}'; expected a file ending in .jsonl, .json, .csv, .tsv, .parquet, "
            "perhaps with .gz, .bz2, .xz, .zst after it."
        )


def test_a_folder_that_is_no_data_set_is_refused_with_the_reason(tmp_path):
    message = refusal(str(tmp_path))
    assert (
        f"`train_data` is '{tmp_path}': neither a file (.jsonl, .json, .csv, .tsv, .parquet) nor a data set" in message
    )
    assert "doesn't contain any data files" in message


@pytest.mark.parametrize(
    "data", [[], (), Dataset.from_dict({"prompt": [], "output": []})], ids=["list", "tuple", "data set"]
)
def test_no_rows_are_refused(data):
    assert refusal(data) == "`train_data` has no rows; expected at least one."


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ([1, 2], "[1, 2] of type list"),
        ([ROWS[0], "rows.jsonl"], "of type list"),
        (ROWS[0], "of type dict"),
        (DatasetDict(train=Dataset.from_list(ROWS)), "of type DatasetDict"),
        (pd.DataFrame(ROWS), "of type DataFrame"),
    ],
)
def test_anything_else_is_refused_with_what_is_expected(data, kind):
    message = refusal(data, TypeError)
    assert kind in message
    assert message.startswith("`train_data` is ")
    assert message.endswith(
        "expected a file, a data set's name, a list of these, a `datasets.Dataset`, or a list of dictionaries."
    )
