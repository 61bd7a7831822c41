"""From rows to token ids: malformed rows, rows without a response, and rows that are too long."""

import json
from datetime import date

import pytest
from datasets import Dataset
from support.chat import CHATML, chat_tokenizer
from support.models import character_tokenizer
from support.rows import ENCODED, ROWS, encode, encoded, refusal, write, write_csv, write_lines, write_parquet

ABSENT = object()
BAD_VALUES = {
    "absent": (ABSENT, "no value for `{field}` (`{argument}`). The row has ["),
    "null": (None, "no value for `{field}` (`{argument}`). The row has ['answer', 'output', 'prompt']."),
    "number": (7, "`{field}` (`{argument}`) is 7 of type int, expected a string."),
    "list": (["a"], "`{field}` (`{argument}`) is ['a'] of type list, expected a string."),
    "long": (
        [1] * 99,
        "`{field}` (`{argument}`) is [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ... of type list, expected",
    ),
    "lone surrogate": ("a\ud800", "`{field}` (`{argument}`) holds a lone surrogate, which is not text: 'a\\ud800'."),
}


@pytest.mark.parametrize("problem", BAD_VALUES)
@pytest.mark.parametrize(
    ("field", "argument"),
    [("prompt", "prompt_field"), ("output", "output_field"), ("answer", "ground_truth_field")],
)
def test_a_bad_value_is_named_with_file_line_and_field(tmp_path, field, argument, problem):
    good = {"prompt": "a", "output": "b", "answer": "c"}
    value, words = BAD_VALUES[problem]
    bad = {name: text for name, text in (good | {field: value}).items() if text is not ABSENT}
    words = words.format(field=field, argument=argument)

    path = write(tmp_path / "rows.jsonl", f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    assert f"line 3 of {path}: {words}" in refusal(path, ground_truth_field="answer")
    path = write(tmp_path / "rows.json", json.dumps([good, bad]))
    assert f"row 2 of {path}: {words}" in refusal(path, ground_truth_field="answer")
    assert f"row 2 of `train_data`: {words}" in refusal([good, bad], ground_truth_field="answer")


def test_a_bad_value_is_named_in_every_other_kind_of_data_too(tmp_path):
    numbers = [{"prompt": "a", "output": 1}]
    path = write_parquet(tmp_path / "rows.parquet", *numbers)
    assert f"row 1 of {path}: `output` (`output_field`) is 1 of type int" in refusal(path)
    assert f"row 1 of {tmp_path}: `output` (`output_field`) is 1 of type int" in refusal(str(tmp_path))
    assert "row 1 of `train_data`: `output` (`output_field`) is 1 of type int" in refusal(Dataset.from_list(numbers))
    path = write_csv(tmp_path / "rows.csv", ROWS[0], ROWS[1])
    assert f"row 1 of {path}: no value for `answer` (`ground_truth_field`)" in refusal(
        path, ground_truth_field="answer"
    )


def test_a_row_is_counted_from_the_start_of_its_file_however_many_rows_come_before(tmp_path):
    rows = [{"prompt": "a", "output": "b"}] * 1500
    last = write_lines(tmp_path / "z.jsonl", *rows, {"prompt": "a"})
    assert f"line 1501 of {last}: no value for `output`" in refusal([write_lines(tmp_path / "a.jsonl", *rows), last])
    assert "row 1501 of `train_data`: no value for `output`" in refusal(Dataset.from_list([*rows, {"prompt": "a"}]))


def test_a_value_that_json_cannot_hold_does_not_become_text():
    message = refusal([{"prompt": "a", "output": date(2020, 1, 1)}])
    assert "row 1 of `train_data`: `output` (`output_field`) is {'date': 'datetime.date(2020, 1, 1)'}" in message


def test_a_type_that_datasets_guesses_is_refused_and_never_turned_back_into_other_text(tmp_path):
    write_lines(tmp_path / "train.jsonl", {"prompt": "a", "output": "2020-01-01"})
    message = refusal(str(tmp_path))
    assert f"row 1 of {tmp_path}: `output` (`output_field`) is datetime" in message
    assert "expected a string" in message
    assert encode(str(tmp_path / "*.jsonl")).dataset["output"][:] == ["2020-01-01"]


def test_a_row_without_response_token_is_refused_with_the_way_out(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS[0], {"prompt": "a", "output": ""})
    assert refusal(path, append_eos=False) == (
        f"line 2 of {path}: no response token to learn from; the response is ''. Remove the row, or set "
        "`append_eos=True`."
    )
    assert encode(path).dataset[1]["input_ids"] == [97, 128]


def test_a_first_token_without_anything_before_it_is_no_response_token():
    rows = [{"prompt": "", "output": "a"}]
    assert "row 1 of `train_data`: no response token to learn from; the response is 'a'." in refusal(
        rows, append_eos=False
    )
    assert encode(rows).dataset[0]["num_response_tokens"] == 1
    message = refusal([{"prompt": "", "output": ""}])
    assert message.endswith("; the response is '', and its EOS has no token before it. Remove the row.")
    assert encode(rows, character_tokenizer(bos=True), append_eos=False).dataset[0]["input_ids"] == [129, 97]


LENGTHS = [
    {"prompt": "ab", "output": "c"},  # 4 tokens with EOS
    {"prompt": "ab", "output": "cd"},  # 5
    {"prompt": "abc", "output": "def"},  # 7
    {"prompt": "abcd", "output": "e"},  # 6, of which 4 are the prompt
    {"prompt": "abcdef", "output": "g"},  # 8, of which 6 are the prompt
]


def test_a_row_as_long_as_max_length_is_kept_whole():
    for too_long in ("error", "drop", "truncate"):
        rows = encode(LENGTHS, max_length=8, too_long=too_long)
        assert rows.dataset[:] == encode(LENGTHS).dataset[:]
        assert rows.dataset["num_tokens"][:] == [4, 5, 7, 6, 8]
        assert (rows.report.num_dropped, rows.report.num_truncated) == (0, 0)


def test_a_longer_row_is_an_error_that_names_file_row_lengths_and_way_out(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", *LENGTHS)
    assert refusal(path, max_length=7) == (
        f"line 5 of {path}: 8 tokens (6 of the prompt) exceed `max_length` = 7. "
        'Raise `max_length`, or set `too_long` to "drop" or "truncate".'
    )
    assert f"line 2 of {path}: 5 tokens (2 of the prompt) exceed `max_length` = 4." in refusal(path, max_length=4)


def test_longer_rows_are_dropped_and_counted():
    rows = encode(LENGTHS, max_length=5, too_long="drop")
    assert rows.dataset["input_ids"][:] == [[97, 98, 99, 128], [97, 98, 99, 100, 128]]
    assert rows.dataset["prompt"][:] == ["ab", "ab"]
    assert (rows.report.num_dropped, rows.report.num_truncated) == (3, 0)


def test_of_dropped_rows_neither_text_nor_tokens_are_stored():
    lengths = [900 if index < 1300 or index % 2 else 1 for index in range(2500)]
    rows = encode([{"prompt": "a" * length, "output": "b"} for length in lengths], max_length=5, too_long="drop")
    assert (len(rows.dataset), rows.report.num_dropped, rows.report.num_truncated) == (600, 1900, 0)
    assert rows.dataset.data.nbytes < 2500 * 200


def test_longer_rows_are_cut_without_eos_and_those_without_room_for_a_response_are_dropped():
    rows = encode(LENGTHS, max_length=4, too_long="truncate")
    assert rows.dataset["input_ids"][:] == [[97, 98, 99, 128], [97, 98, 99, 100], [97, 98, 99, 100]]
    assert rows.dataset["num_prompt_tokens"][:] == [2, 2, 3]
    assert rows.dataset["num_tokens"][:] == [4, 4, 4]
    assert rows.dataset["num_response_tokens"][:] == [2, 2, 1]
    assert rows.dataset["output"][:] == ["c", "cd", "def"]
    assert (rows.report.num_dropped, rows.report.num_truncated) == (2, 2)


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_no_row_may_be_left(too_long):
    rows = encode(LENGTHS[3:], max_length=3, too_long=too_long)
    assert encoded(rows) == {column: [] for column in ENCODED}
    assert (rows.report.num_dropped, rows.report.num_truncated) == (2, 0)


def test_without_eos_there_is_one_token_less():
    rows = encode(LENGTHS[:2], max_length=4, append_eos=False)
    assert rows.dataset["input_ids"][:] == [[97, 98, 99], [97, 98, 99, 100]]
    assert rows.dataset["num_response_tokens"][:] == [1, 2]


def test_each_row_keeps_its_location_and_of_several_files_its_file(tmp_path):
    first = write(tmp_path / "a.jsonl", "\n".join(["", json.dumps(ROWS[0]), "", json.dumps(ROWS[1])]))
    second = write_csv(tmp_path / "b.csv", ROWS[2])
    assert encode(first).dataset["location"][:] == ["line 2", "line 4"]
    assert encode([first, second]).dataset["location"][:] == [
        f"line 2 of {first}",
        f"line 4 of {first}",
        f"row 1 of {second}",
    ]


def test_an_empty_response_is_told_with_the_rows_that_have_one():
    rows = [{"prompt": "a", "output": ""}, {"prompt": "b", "output": "c"}, {"prompt": "d", "output": " "}]
    ((notice, num_rows),) = encode(rows).report.notices.items()
    assert (notice.kind, notice.example, num_rows) == ("empty", "'a'", 2)
    asked = {"role": "user", "content": "a"}
    for answer, kinds in (("", ["empty"]), ("b", [])):
        rows = [{"messages": [asked, {"role": "assistant", "content": answer}]}]
        assert [notice.kind for notice in encode(rows, chat_tokenizer(CHATML)).report.notices] == kinds
