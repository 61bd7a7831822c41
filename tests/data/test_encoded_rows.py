"""Encoded rows are found in the cache again, unless anything that matters has changed; text and ids stay on disk."""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from support.models import character_tokenizer
from support.rows import (
    DATA,
    ENCODED,
    ROWS,
    encode,
    encoded,
    raise_held_back,
    refusal,
    write,
    write_csv,
    write_lines,
    write_parquet,
)
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lightning_sft.data import cache, encoding
from lightning_sft.data.encoded_rows import read_numbers
from lightning_sft.data.rows import sources
from lightning_sft.data.rows.readers import read_file
from lightning_sft.data.tokens.tokenization import encode_examples


@pytest.fixture
def tokenised(monkeypatch, tmp_path) -> list[str]:
    """The prompts tokenised so far; the cache is empty at first."""
    prompts: list[str] = []

    def spy(prompt_strs, *others):
        prompts.extend(prompt_strs)
        return encode_examples(prompt_strs, *others)

    monkeypatch.setattr(encoding, "encode_examples", spy)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return prompts


def data_folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.usefixtures("addresses")
@pytest.mark.parametrize("kind", DATA)
def test_no_row_is_tokenised_twice(tmp_path, tokenised, kind):
    data = DATA[kind](data_folder(tmp_path))
    encode(data)
    assert sorted(tokenised) == sorted(ENCODED["prompt"])
    assert encoded(encode(data)) == ENCODED
    assert len(tokenised) == 3


@pytest.mark.parametrize("kind", ["JSONL", "JSON list", "JSON lines in .json", "CSV", "Parquet"])
def test_the_same_content_in_another_file_is_not_tokenised_again(tmp_path, tokenised, kind):
    path = Path(DATA[kind](data_folder(tmp_path)))
    encode(path)
    os.utime(path, (1, 1))
    copy = shutil.copy(path, path.with_stem("copy"))
    assert encode(path).dataset[:] == encode(copy).dataset[:]
    assert encoded(encode(copy)) == ENCODED
    assert len(tokenised) == 3


def test_an_error_names_the_file_given_even_if_the_same_content_was_read_from_another_before(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", *ROWS)
    second = shutil.copy(first, tmp_path / "second.jsonl")
    for path in (first, second):
        assert refusal(path, max_length=7) == (
            f"line 2 of {path}: 8 tokens (5 of the prompt) exceed `max_length` = 7. "
            'Raise `max_length`, or set `too_long` to "drop" or "truncate".'
        )


@pytest.mark.parametrize(
    ("suffix", "write_rows"),
    [("jsonl", write_lines), ("json", write_lines), ("csv", write_csv), ("parquet", write_parquet)],
)
def test_a_changed_file_is_read_anew_even_with_size_and_time_of_the_old_one(tmp_path, tokenised, suffix, write_rows):
    path = tmp_path / f"rows.{suffix}"
    results = []
    for output in "bc":
        write_rows(path, {"prompt": "a", "output": output})
        os.utime(path, (1_000_000_000, 1_000_000_000))
        results += encode(str(path)).dataset["input_ids"][:]
    assert results == [[97, 98, 128], [97, 99, 128]]


def test_the_same_bytes_in_files_of_two_kinds_are_not_confused(tmp_path):
    content = '{"prompt": "a", "output": "b"}\n' * 2
    assert encode(write(tmp_path / "rows.jsonl", content)).dataset["input_ids"][:] == [[97, 98, 128]] * 2
    message = refusal(write(tmp_path / "rows.csv", content))
    assert f"row 1 of {tmp_path / 'rows.csv'}: no value for `prompt`" in message


def test_rows_are_read_and_tokenised_anew_by_other_code(tmp_path, tokenised, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", *ROWS)
    read = []
    monkeypatch.setattr(sources, "read_file", lambda path, kind: read.append(path) or read_file(path, kind=kind))
    counts = []
    for module, code in ((encoding, "one"), (sources, "one"), (encoding, "two"), (sources, "two")):
        monkeypatch.setattr(module, "code_hash", lambda code=code: code)
        for _ in range(2):
            encode(path)
            counts.append((len(read), len(tokenised)))
    assert counts == [(1, 3), (1, 3), (2, 6), (2, 6), (2, 9), (2, 9), (3, 12), (3, 12)]


def test_the_hash_of_the_code_changes_with_each_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    hashes = set()
    for name, content in (
        ("cache.py", "a = 1"),
        ("cache.py", "a = 2"),
        ("readers.py", "b = 1"),
        ("readers.py", "b = 2"),
    ):
        write(tmp_path / name, content)
        hashes.add(cache.code_hash.__wrapped__())
    assert len(hashes) == 4


def swapped_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer with the ids of `a` and `b` exchanged: the same tokens, another meaning."""
    content = json.loads(character_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"] |= {"a": 98, "b": 97}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<eos>")


def tokenizer_with_eos(token: str) -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer(pad=True)
    tokenizer.eos_token = token
    return tokenizer


CHANGES = {
    "nothing": ({}, [97, 98, 99, 100, 128]),
    "max_length": ({"max_length": 4, "too_long": "truncate"}, [97, 98, 99, 100]),
    "larger max_length": ({"max_length": 5, "too_long": "truncate"}, [97, 98, 99, 100, 128]),
    "too_long": ({"max_length": 4, "too_long": "drop"}, None),
    "append_eos": ({"append_eos": False}, [97, 98, 99, 100]),
    "prompt_field": ({"prompt_field": "other"}, [120, 99, 100, 128]),
    "output_field": ({"output_field": "other"}, [97, 98, 120, 128]),
    "template": ({"prompt_template": "{other}:"}, [120, 58, 99, 100, 128]),
    "other template": ({"prompt_template": "{other};"}, [120, 59, 99, 100, 128]),
    "transform": ({"row_transform": lambda row: row | {"prompt": "y"}}, [121, 99, 100, 128]),
    "other transform": ({"row_transform": lambda row: row | {"prompt": "z"}}, [122, 99, 100, 128]),
    "vocabulary": ({"tokenizer": swapped_tokenizer()}, [98, 97, 99, 100, 128]),
    "BOS": ({"tokenizer": character_tokenizer(bos=True)}, [129, 97, 98, 99, 100, 128]),
    "pad token": ({"tokenizer": tokenizer_with_eos("<eos>")}, [97, 98, 99, 100, 128]),
    "EOS": ({"tokenizer": tokenizer_with_eos("<pad>")}, [97, 98, 99, 100, 130]),
}


def test_a_change_of_anything_that_matters_is_never_served_old_ids(tmp_path, tokenised):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "ab", "output": "cd", "other": "x"})
    for again in (False, True):
        for change, (options, ids) in CHANGES.items():
            assert encode(path, **options).dataset["input_ids"][:] == ([] if ids is None else [ids]), change
            assert len(tokenised) == len(CHANGES) if again else list(CHANGES).index(change) + 1


def test_special_tokens_in_the_text_are_split_after_all_when_the_tokenizer_is_told_to(tokenised):
    rows = [{"prompt": "a", "output": "<pad>"}]
    assert encode(rows, tokenizer_with_eos("<eos>")).dataset["num_tokens"][:] == [3]
    splitting = tokenizer_with_eos("<eos>")
    splitting.split_special_tokens = True
    assert encode(rows, splitting).dataset["num_tokens"][:] == [7]


def test_an_edited_template_file_is_never_served_old_ids(tmp_path, tokenised):
    results = []
    for template in ("{prompt}?", "{prompt}!"):
        path = write(tmp_path / "template.txt", template)
        results += encode([{"prompt": "a", "output": "b"}], prompt_template=path).dataset["input_ids"][:]
    assert results == [[97, 63, 98, 128], [97, 33, 98, 128]]


@pytest.mark.parametrize("call", ["transform", "functools.partial(transform)", "Transform()", "Transform().apply"])
def test_an_edited_transform_is_never_served_old_ids(tmp_path, tokenised, monkeypatch, call):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    results = []
    for prompt in "xy":
        source = (
            "import functools\n"
            f"def transform(row): return dict(row, prompt={prompt!r})\n"
            "class Transform:\n"
            "    def __call__(self, row): return transform(row)\n"
            "    def apply(self, row): return transform(row)\n"
            f"chosen = {call}\n"
        )
        write(tmp_path / "transform_of_a_test.py", source)
        sys.modules.pop("transform_of_a_test", None)
        importlib.invalidate_caches()
        module = importlib.import_module("transform_of_a_test")
        for _ in range(2):
            results += encode([{"output": "b"}], row_transform=module.chosen).dataset["input_ids"][:]
    del sys.modules["transform_of_a_test"]
    assert results == [[120, 98, 128]] * 2 + [[121, 98, 128]] * 2
    assert tokenised == ["x", "y"]


def test_using_the_tokenizer_in_between_changes_nothing(tokenised):
    tokenizer = character_tokenizer(pad=True)
    encode(ROWS, tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    tokenizer.padding_side = "left"
    assert tokenizer.backend_tokenizer.padding
    assert tokenizer.backend_tokenizer.truncation
    assert encoded(encode(ROWS, tokenizer)) == ENCODED
    assert len(tokenised) == 3


class PythonTokenizer(PreTrainedTokenizer):
    """One token a letter, without the `tokenizers` library."""

    def __init__(self, letters: str, **options: object) -> None:
        self.letters = letters
        super().__init__(eos_token=letters[0], special_tokens_pattern="none", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: index for index, letter in enumerate(self.letters)}

    def _tokenize(self, text: str, **options: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.index(token)


def test_a_tokenizer_written_in_python_is_known_by_its_vocabulary_and_options(tokenised):
    rows = [{"prompt": "a", "output": "b"}]
    for again in (False, True):
        assert encode(rows, PythonTokenizer(".ab")).dataset["input_ids"][:] == [[1, 2, 0]]
        assert encode(rows, PythonTokenizer(".ba")).dataset["input_ids"][:] == [[2, 1, 0]]
        assert encode(rows, PythonTokenizer(".ab", lower=True)).dataset["input_ids"][:] == [[1, 2, 0]]
        assert len(tokenised) == 3, again


def encode_in_three_ways(path: str) -> list[list[list[int]]]:
    rows = [row | {"more": {"z": 1, "y": {"x": "w"}}} for row in ROWS]
    options = {"prompt_template": "{prompt}.", "row_transform": copy.copy}
    tokenizer = character_tokenizer(bos=True, pad=True)
    return [
        encode(data, tokenizer, **options).dataset["input_ids"][:] for data in (path, rows, Dataset.from_list(rows))
    ]


IN_ANOTHER_PROCESS = """
import json, sys, test_encoded_rows

def refuse(*_):
    raise AssertionError("tokenised again")

test_encoded_rows.encoding.encode_examples = refuse
print(json.dumps(test_encoded_rows.encode_in_three_ways(sys.argv[1])))
"""


def test_another_process_tokenises_nothing_again(tmp_path, tokenised):
    path = write_lines(tmp_path / "rows.jsonl", *ROWS)
    here = encode_in_three_ways(path)
    assert len(tokenised) == 9
    env = {
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONHASHSEED": "1",
    }
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, path]
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout) == here


@pytest.mark.parametrize("kind", ["JSONL with blank lines", "Parquet", "list of dictionaries"])
def test_two_processes_give_the_same_rows_as_one(tmp_path, tokenised, kind):
    rows = encode(DATA[kind](data_folder(tmp_path)), num_proc=2)
    assert tokenised == []
    assert encoded(rows) == ENCODED


def fail_for_the_last(row: dict[str, object]) -> dict[str, object]:
    return raise_held_back(row) if row["prompt"] == "12" else row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ground_truth_field": "answer"}, "no value for `answer` (`ground_truth_field`). The row has ["),
        ({"max_length": 12}, "13 tokens (2 of the prompt) exceed `max_length` = 12."),
        ({"row_transform": fail_for_the_last}, "`row_transform` failed: HeldBackError: not today"),
    ],
)
def test_an_error_of_another_process_arrives_in_the_same_words(tmp_path, options, words):
    path = write_lines(tmp_path / "rows.jsonl", *({"answer": "a"} | row for row in ROWS[:2]), ROWS[2])
    message = refusal(path, num_proc=2, **options)
    assert message.startswith(f"line 3 of {path}: {words}")
    assert message == refusal(path, **options)


def test_text_and_ids_stay_on_disk(tmp_path, tokenised):
    num_rows, length = 6000, 5000
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for index in range(num_rows):
            file.write(f'{{"prompt": "a", "output": "b", "ground_truth": "{index:0{length}}"}}\n')
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        rows = encode(str(path), max_length=3, too_long="drop").dataset
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == num_rows
    assert len(rows[num_rows - 1]["ground_truth"]) == length
    assert peak < num_rows * length * 0.8
    assert pa.total_allocated_bytes() - before < num_rows * length / 10


@pytest.mark.parametrize("kind", ["memory", "jsonl", "parquet"])
def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch, kind):
    files = {"jsonl": write_lines, "parquet": write_parquet}
    data = files[kind](tmp_path / f"rows.{kind}", *ROWS) if kind in files else ROWS
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", write(tmp_path / "cache", "a file"))
    message = refusal(data)
    assert message.startswith(
        f"The cache of `datasets`, {tmp_path / 'cache'}, cannot be used: [Errno 20] Not a directory"
    )
    assert message.endswith(
        "Set the environment variable `HF_DATASETS_CACHE` to a folder that can be written and has room."
    )


@pytest.mark.parametrize("fault", ["full", "part"])
def test_a_fault_of_the_cache_is_not_that_of_the_file_which_is_read(tmp_path, monkeypatch, fault):
    path = write_lines(tmp_path / "rows.jsonl", *ROWS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if fault == "full":
        monkeypatch.setattr(
            sources, "read_file", lambda path, kind: (_ for _ in ()).throw(OSError(28, "No space left"))
        )
    else:
        (tmp_path / "cache").mkdir()
        write(tmp_path / "cache" / "generator", "a file")
    assert refusal(path).startswith(f"The cache of `datasets`, {tmp_path / 'cache'}, cannot be used: [Errno ")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only some systems say it")
def test_no_more_processes_tokenise_than_this_one_may_have_cores(monkeypatch):
    def stop(*args, num_proc, **options):
        raise KeyError(num_proc)

    monkeypatch.setattr(Dataset, "map", stop)
    for cores, expected in (({5}, None), ({2, 3}, 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        with pytest.raises(KeyError) as stopped:
            encode(ROWS * 10_000)
        assert stopped.value.args == (expected,)


def test_a_full_disk_is_a_fault_of_the_cache(monkeypatch):
    def is_full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "map", is_full)
    assert "cannot be used: [Errno 28] No space left on device. Set" in refusal(ROWS)


def test_numbers_are_those_of_the_rows_wherever_they_were_selected_from():
    rows = encode([{"prompt": "a" * (i % 5), "output": "b" * (1 + i % 3)} for i in range(20)]).dataset
    parts = rows.train_test_split(0.4, seed=1)
    for part in (rows, rows.select(range(3, 9)), parts["train"], parts["test"].select([5, 0, 5])):
        assert read_numbers(part, "num_tokens").tolist() == part["num_tokens"][:]


def test_numbers_are_read_without_an_object_for_each_row():
    num_rows = 100_000
    rows = Dataset.from_dict({"number": np.arange(num_rows, dtype=np.int32)}).select(np.arange(num_rows)[::-1])
    tracemalloc.start()
    try:
        read_numbers(rows, "number")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / num_rows < 17
