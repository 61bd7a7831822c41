"""Malformed rows: left out, counted by what is wrong with them, and shown; nothing else changes."""

import json
import warnings
from pathlib import Path

import pytest
from support.chat import CHATML, GEMMA, LONG, THINKING, assistant, chat_tokenizer, user
from support.models import character_tokenizer
from support.rows import encode, encoded, refusal, write, write_csv, write_lines, write_parquet

from lightning_sft import SFTDataModule
from lightning_sft.data import encoding
from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.tokens.tokenization import encode_examples
from lightning_sft.errors import SettingsError

GOOD = [{"prompt": "a", "output": "b"}, {"prompt": "c", "output": "d"}, {"messages": LONG[:2]}]
BAD = {
    b"{\n": "not valid JSON (Expecting property name enclosed in double quotes at column 1): '{\\n'",
    b"5\n": "expected a JSON object, got 5.",
    '{"prompt": "é"}\n'.encode("latin-1"): "not UTF-8 text (invalid continuation byte). Save the file as UTF-8.",
    b'{"prompt": "a"}\n': "no value for `output` (`output_field`). The row has ['prompt'].",
    b'{"prompt": "a", "output": 3}\n': "`output` (`output_field`) is 3 of type int, expected a string.",
    b'{"prompt": "a", "output": "\\ud800"}\n': "`output` (`output_field`) holds a lone surrogate, which is not text: ",
    b'{"messages": []}\n': "`messages` has no messages; expected at least one.",
    json.dumps({"messages": [user("a"), user("b"), assistant("c")]}).encode() + b"\n": (
        "the chat template refuses the first 3 messages: TemplateError: roles must alternate"
    ),
    json.dumps({"messages": [user("a")]}).encode() + b"\n": (
        "no turn of the assistant to learn from among 1 message. Remove the row."
    ),
}


def mixed(path: Path) -> str:
    """A bad row before each good one, as long as there are any; then all other bad ones."""
    lines = [json.dumps(row).encode() + b"\n" for row in GOOD]
    bad = list(BAD)
    return write(path, b"".join(bad[index] + lines[index] for index in range(3)) + b"".join(bad[3:]))


def test_each_kind_of_bad_row_is_left_out_and_shown_with_its_place(tmp_path):
    tokenizer, path = chat_tokenizer(GEMMA), mixed(tmp_path / "rows.jsonl")
    rows = encode(path, tokenizer, bad_rows="drop")
    assert encoded(rows) == encoded(encode(GOOD, tokenizer))
    assert rows.dataset["location"][:] == ["line 2", "line 4", "line 6"]
    counted = rows.report.bad_rows.counted
    assert {first.location: num_rows for first, num_rows in counted.items()} == {
        f"line {number}": 1 for number in (1, 3, 5, 7, 8, 9, 10, 11, 12)
    }
    for first, words in zip(counted, BAD.values(), strict=True):
        assert first.problem.startswith(words)
    assert rows.report.num_dropped == 0


def test_by_default_the_first_bad_row_is_an_error(tmp_path):
    path = mixed(tmp_path / "rows.jsonl")
    assert refusal(path, tokenizer=chat_tokenizer(GEMMA)).startswith(f"line 1 of {path}: not valid JSON")
    with pytest.raises(ValueError, match=r"`bad_rows` is 'skip', expected one of error, drop."):
        encode(path, bad_rows="skip")


def test_bad_rows_are_known_when_all_comes_from_the_cache(tmp_path, monkeypatch):
    tokenised = []
    monkeypatch.setattr(encoding, "encode_examples", lambda *given: tokenised.append(given) or encode_examples(*given))
    path = write_lines(tmp_path / "rows.jsonl", GOOD[0], {"prompt": "a"}, {"prompt": "x", "output": "y", "input": "z"})
    results = [encode(path, bad_rows="drop") for _ in range(2)]
    assert len(tokenised) == 1
    for rows in results:
        assert rows.report.bad_rows.in_words() == [
            "1 row, line 2: no value for `output` (`output_field`). The row has ['prompt']."
        ]
        assert rows.report.unused_columns == ["input"]


def test_rows_that_are_too_long_are_another_matter(tmp_path):
    long = {"prompt": "a" * 9, "output": "b"}
    assert "row 2 of `train_data`: 11 tokens" in refusal([GOOD[0], long], bad_rows="drop", max_length=5)
    rows = encode([GOOD[0], long, {"prompt": "a"}], bad_rows="drop", max_length=5, too_long="drop")
    assert (len(rows.dataset), rows.report.num_dropped, rows.report.bad_rows.total) == (1, 1, 1)
    assert "row 2 of `train_data`: no value for `output`" in refusal(
        [GOOD[0], {"prompt": "a"}], max_length=5, too_long="drop"
    )


def test_a_missing_eos_is_no_matter_of_the_rows():
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    assert refusal(GOOD[:2], tokenizer=tokenizer, bad_rows="drop").startswith("`append_eos` is True, but the tokenizer")


def test_a_row_without_anything_to_learn_is_bad():
    rows = encode([GOOD[0], {"prompt": "a", "output": ""}], bad_rows="drop", append_eos=False)
    assert rows.report.bad_rows.in_words() == [
        "1 row, row 2: no response token to learn from; the response is ''. Remove the row, or set `append_eos=True`."
    ]


@pytest.fixture
def no_tokens_for_x(monkeypatch):
    """As if a turn began within a token, in each example with an x."""
    plain = ChatEncoder._encoded

    def encode_others(encoder, written, text):
        if "x" in written.text:
            raise SettingsError("turn 2 (assistant) begins within a token")
        return plain(encoder, written, text)

    monkeypatch.setattr(ChatEncoder, "_encoded", encode_others)


@pytest.mark.usefixtures("no_tokens_for_x")
def test_a_conversation_that_cannot_be_tokenised_takes_no_other_with_it():
    rows = [{"messages": [user("q"), assistant(answer)]} for answer in "axbxc"]
    found = encode([*rows, GOOD[0]], chat_tokenizer(CHATML), bad_rows="drop")
    assert found.dataset["output"][:] == ["a", "b", "c", "b"]
    assert found.report.bad_rows.in_words() == ["2 rows such as row 2: turn 2 (assistant) begins within a token"]


@pytest.mark.usefixtures("no_tokens_for_x")
def test_of_a_bad_row_no_example_is_left():
    first, *others = (assistant(answer, reasoning_content="r") for answer in "abx")
    rows = [{"messages": [user("q"), first, user("q"), last]} for last in others]
    found = encode(rows, chat_tokenizer(THINKING), bad_rows="drop")
    assert found.dataset["output"][:] == ["<think>r</think>a", "<think>r</think>b"]
    assert (found.report.num_rows, found.report.bad_rows.total) == (1, 1)


def test_bad_rows_of_every_kind_of_data_are_left_out(tmp_path):
    numbers = {"prompt": "x", "output": None}
    parquet = write_parquet(tmp_path / "a.parquet", *GOOD[:2], numbers)
    table = write(tmp_path / "b.csv", Path(write_csv(tmp_path / "c.csv", *GOOD[:2])).read_text() + "x\n")
    values = write(tmp_path / "d.json", json.dumps([*GOOD[:2], 5]))
    memory = [*GOOD[:2], {"prompt": "x", ("a", 1): 2}]
    for data in (parquet, table, values, memory):
        rows = encode(data, bad_rows="drop")
        assert rows.dataset["input_ids"][:] == [[97, 98, 128], [99, 100, 128]]
        assert [row.location for row in rows.report.bad_rows.counted] == ["row 3"]


def test_of_several_sources_bad_rows_are_named_with_their_source_and_counted_before_weights(tmp_path, caplog):
    good = [write_lines(tmp_path / f"{name}.jsonl", *GOOD[:2]) for name in "ab"]
    bad = [write_lines(tmp_path / f"{name}.jsonl", *GOOD[:2], {"prompt": name}) for name in "cd"]
    for data, weights in ((good, (2, 0.5)), (bad, (2, 0.5))):
        module = SFTDataModule(
            character_tokenizer(), dict(zip(data, weights, strict=True)), bad_rows="drop", batch_size=1, num_proc=2
        )
        module.setup("fit")
        assert module.training_rows.count_steps() == 5
    assert (
        f"left out 2 of 6 rows that cannot be used (`bad_rows` is 'drop').\n  2 rows such as line 3 of {bad[0]}: no"
        in (caplog.text)
    )


def test_what_is_left_out_is_told_and_previewed(caplog):
    rows = [*GOOD[:2], {"prompt": "a"}, {"prompt": "a", "output": 5}, {"prompt": "b"}]
    data = SFTDataModule(character_tokenizer(), rows, val_data=rows[1:3], bad_rows="drop")
    words = " ".join(str(data.preview(1)).split())
    assert "rows 2 1 rows left out 3 1 tokens" in words
    assert "train: 2 rows such as row 3: no value for `output` (`output_field`)." in words
    assert "train: 1 row, row 4: `output` (`output_field`) is 5 of type int, expected a string." in words
    assert "val: 1 row, row 2: no value" in words
    assert "val: 1 row, row 2: no value" in data.preview(1)._repr_html_()
    assert "train_data: left out 3 of 5 rows that cannot be used (`bad_rows` is 'drop').\n  2 rows" in caplog.text
    assert "val_data: left out 1 of 2 rows" in caplog.text


def test_where_no_row_is_good_the_reasons_are_an_error():
    rows = [{"prompt": "a"}, {"prompt": "b", "output": 3}, {"prompt": "a" * 9, "output": "c"}]
    options = {"bad_rows": "drop", "max_length": 5, "too_long": "drop"}
    with pytest.raises(SettingsError) as caught:
        SFTDataModule(character_tokenizer(), rows, **options).setup("fit")
    assert str(caught.value) == (
        "`train_data`: no row can be used. 1 row, row 1: no value for `output` (`output_field`). The row has "
        "['prompt']. 1 row, row 2: `output` (`output_field`) is 3 of type int, expected a string. Rows longer "
        "than `max_length` = 5 tokens: 1."
    )


def test_validation_rows_are_taken_from_the_good_ones_as_if_there_were_no_others(tmp_path):
    good = [{"prompt": f"{number}", "output": "x"} for number in range(10)]
    mixed_rows = [row for number, row in enumerate(good) for row in ([{"prompt": "x"}] * (number % 3) + [row])]
    splits = []
    for rows in (good, mixed_rows):
        data = SFTDataModule(character_tokenizer(), rows, val_fraction=0.3, bad_rows="drop")
        data.preview()
        splits.append([prompt.text for prompt in data.prompts("fit")])
    assert splits[0] == splits[1]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_rows_that_prompt_for_nothing_are_left_out_of_predictions(caplog):
    rows = [{"prompt": "a"}, {"output": "x"}, {"messages": [user("q")]}, {"prompt": "b"}]
    data = SFTDataModule(character_tokenizer(), predict_data=rows, bad_rows="drop")
    data.setup("predict")
    assert [(prompt.index, prompt.text) for prompt in data.prompts("predict")] == [(0, "a"), (1, "b")]
    assert "predict_data: left out 2 of 4 rows that cannot be used" in caplog.text
    assert "1 row, row 2 of `predict_data`: no value for `prompt` (`prompt_field`)" in caplog.text

    with pytest.raises(ValueError, match=r"^row 2 of `predict_data`: no value for `prompt`"):
        SFTDataModule(character_tokenizer(), predict_data=rows).setup("predict")
    with pytest.raises(
        ValueError, match=r"^`predict_data`: no row can be used. 1 row, row 1 of `predict_data`: no value"
    ):
        SFTDataModule(character_tokenizer(), predict_data=rows[1:2], bad_rows="drop").setup("predict")


# -- columns that nothing uses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_nothing_uses_are_named_once_for_each_argument_from_the_cache_too(tmp_path, streaming):
    rows = [{"prompt": "a", "output": "b", "system": "c", "history": []}] * 2
    path = write_lines(tmp_path / "rows.jsonl", *rows, {**rows[0], "input": "d"})
    for _ in range(2):
        data = SFTDataModule(
            character_tokenizer(), path, val_data=rows, predict_data=path, max_length=8, streaming=streaming
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for stage in ("fit", "validate", "predict"):
                data.setup(stage)
        messages = [str(warning.message) for warning in caught if "nothing uses" in str(warning.message)]
        assert [message.partition(":")[0] for message in messages] == [
            "train_data, first 1,000 rows" if streaming else "train_data",
            "val_data",
            "predict_data",
        ]
        assert messages[1] == (
            "val_data: nothing uses the column `system`. `as_chat: true` writes `system`, `tools`, prompt and output "
            "with the chat template; `prompt_template` can name any column."
        )
        assert (
            "nothing uses the columns `input`, `system`. `row_transform: lightning_sft.alpaca_row` makes" in messages[0]
        )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"system_prompt": "a"},
            "`system_prompt`. `row_transform` can rename `system_prompt` to `system`, which stands",
        ),
        ({"images": ["a.png"]}, "`images`. `row_filter` can leave out rows with more than text, since nothing else is"),
    ],
)
def test_columns_beside_a_conversation_that_nothing_uses_are_named(more, words):
    rows = [{"messages": LONG, "system": "a", "history": [], "input": "b"}, {"messages": LONG, **more}]
    with pytest.warns(match=f"^train_data: nothing uses the column {words}"):
        SFTDataModule(chat_tokenizer(CHATML), rows).setup("fit")


@pytest.mark.parametrize("streaming", [False, True])
def test_settings_of_conversations_without_one_are_told(tmp_path, streaming):
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "output": "b"})
    chat = {"train_on_turns": "last", "chat_template_kwargs": {"date": "one"}}
    with pytest.warns(
        match="train_data.*: no row is a conversation, which `train_on_turns` and `chat_template_kwargs`"
    ):
        SFTDataModule(character_tokenizer(), path, streaming=streaming, **chat).setup("fit")
