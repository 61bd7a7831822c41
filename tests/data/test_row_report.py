"""What is said of rows that become several examples, of which some may be too long."""

import pytest
from support.chat import THINKING, THOUGHT, assistant, chat_tokenizer, user

from lightning_sft import SFTDataModule

LONG_LAST = [*THOUGHT[:3], assistant("6!" * 60, reasoning_content="harder")]  # its last turn alone is too long


def load(conversations, **options):
    rows = [{"messages": messages} for messages in conversations]
    lenient = {"max_length": 300, "too_long": "drop", "bad_rows": "drop"}
    data = SFTDataModule(chat_tokenizer(THINKING), rows, **lenient | options)
    data.setup("fit")
    return data


def test_one_row_is_spoken_of_in_the_singular(caplog):
    caplog.set_level("INFO")
    load([THOUGHT])
    assert "train_data: 1 row became 2 examples, one for each turn" in caplog.text


def test_examples_are_counted_where_rows_become_several_whatever_is_left_of_them(caplog):
    caplog.set_level("INFO")
    data = load([LONG_LAST, LONG_LAST, [user("a" * 200), assistant("b")], [user("no answer")]], max_length=120)
    assert "train_data: left out 1 of 4 rows that cannot be used" in caplog.text
    assert "train_data: dropped 3 of 5 examples, longer than `max_length` = 120 tokens." in caplog.text
    facts = data.facts()["data"]
    assert (facts["train rows"], facts["train examples"]) == (2, 2)
    lines = [line.split() for line in str(data.preview(0)).splitlines()]
    assert ["rows", "2"] in lines
    assert ["examples,", "one", "for", "each", "turn", "2"] in lines
    assert ["tokens", "of", "an", "example,", "longest", "45"] in lines


def test_if_all_is_too_long_rows_are_counted():
    with pytest.raises(
        ValueError, match=r"^`train_data`: its only row is longer than `max_length` = 20 tokens\. Raise"
    ):
        load([THOUGHT], max_length=20)
    with pytest.raises(ValueError, match=r"^`train_data`: all 2 rows are longer than `max_length` = 20 tokens\. Raise"):
        load([THOUGHT, THOUGHT], max_length=20)
