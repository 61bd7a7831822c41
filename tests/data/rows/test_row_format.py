"""Which columns are used, how templates are filled, and what `row_transform` may do."""

import codecs
import re
import traceback

import pandas as pd
import pytest
from datasets import Dataset
from support.chat import CHATML, LONG, SYSTEM, assistant, chat_tokenizer, responses, user
from support.rows import (
    ROWS,
    HeldBackError,
    encode,
    raise_held_back,
    refusal,
    write,
    write_lines,
    write_parquet,
)

from lightning_sft import alpaca_row, chosen_row
from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.rows.row_format import ChatRow, PlainRow, RowFormat


def test_the_ground_truth_is_the_output_unless_the_row_has_one():
    rows = [{"prompt": "a", "output": "b"} | more for more in ({}, {"ground_truth": None}, {"ground_truth": ""})]
    assert encode(rows).dataset["ground_truth"][:] == ["b", "b", ""]
    assert [RowFormat().render_prompt(row).ground_truth for row in rows] == [None, None, ""]


def test_columns_are_taken_by_the_names_given():
    row = {"q": "a", "a": "b", "answer": "c", "prompt": 1, "output": 2, "ground_truth": 3}
    names = {"prompt_field": "q", "output_field": "a", "ground_truth_field": "answer"}
    assert RowFormat(**names).render(row) == PlainRow(prompt="a", output="b", ground_truth="c")
    assert encode([row], **names).dataset[0]["input_ids"] == [97, 98, 128]


def test_a_prompt_alone_needs_no_output():
    assert RowFormat().render_prompt({"prompt": "a"}) == PlainRow(prompt="a", output="", ground_truth=None)
    with pytest.raises(ValueError, match="no value for `answer`"):
        RowFormat(ground_truth_field="answer").render_prompt({"prompt": "a"})


TEMPLATES = {
    "{a}": "x",
    "Q: {a}\n": "Q: x\n",
    "{a}{b} {a}": "x{y} x",
    "{{{a}}} {{b}}": "{x} {b}",
    "}}{a}": "}x",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_filled_with_columns_and_doubled_braces_are_literal(template):
    row = {"a": "x", "b": "{y}", "output": "z"}
    assert RowFormat(prompt_template=template).render(row).prompt == TEMPLATES[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_may_come_from_a_file_whose_last_line_break_is_dropped(tmp_path, template, monkeypatch):
    row = {"a": "x", "b": "{y}", "output": "z"}
    for ending in ("\n", "\r\n"):
        path = write(tmp_path / "template.txt", codecs.BOM_UTF8 + (template + ending).encode())
        assert RowFormat(prompt_template=path).render(row).prompt == TEMPLATES[template]
    assert RowFormat(prompt_template=write(tmp_path / "no_end", "{a}")).render(row).prompt == "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RowFormat(prompt_template="~/no_end").render(row).prompt == "x"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{a} {}",
            "`prompt_template` has {}, but expects plain column names such as {question}. Write literal braces twice.",
        ),
        ("{a} {0}", "has {0}, but expects plain column names"),
        ("{a.b}", "has {a.b}, but expects plain column names"),
        ("{a[0]}", "has {a[0]}, but expects plain column names"),
        ("{a!r}", "has {a!r}, but expects plain column names"),
        ("{a:>5}", "has {a:>5}, but expects plain column names"),
        ("{a:{b}}", "has {a:{b}}, but expects plain column names"),
        ('{"answer": 1} {a}', 'has {"answer": 1}, but expects plain column names'),
        (
            "{a",
            "`prompt_template` has unbalanced braces (expected '}' before end of string). Write literal braces twice.",
        ),
        ("{a}}", "has unbalanced braces (Single '}' encountered in format string)"),
        ("{{a}}", "`prompt_template` has no {column} in it, so all prompts would be the same."),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_at_once(template, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RowFormat(prompt_template=template)


@pytest.mark.parametrize("template", ["missing.txt", "Solve the problem. " * 50, "Question }"])
def test_a_template_that_is_neither_text_with_a_column_nor_a_file_is_refused(template):
    words = (
        f"`prompt_template` is {template!r}, which has no {{column}} in it and is no file either. Give a text such as"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(words)):
        RowFormat(prompt_template=template)


def test_a_template_with_an_unknown_column_names_row_and_column(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS[0])
    message = refusal(path, prompt_template="{prompt} {question}")
    assert f"line 1 of {path}: no value for `question` (`prompt_template`). The row has [" in message
    assert "line 1 of" in refusal(write_lines(tmp_path / "n.jsonl", {"n": 1, "output": "a"}), prompt_template="{n}")


def test_the_transform_is_applied_first_and_to_a_copy():
    def transform(row: dict[str, object]) -> dict[str, object]:
        row["output"] = f"{row.pop('n')}!"
        return row

    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    assert encode(rows, row_transform=transform).dataset["input_ids"][:] == [[97, 49, 33, 128], [98, 50, 33, 128]]
    assert RowFormat(row_transform=transform).render_prompt(rows[0]) == PlainRow("a", "", None)
    assert rows == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_a_transform_gets_the_values_of_a_data_set_with_their_types(tmp_path):
    def transform(row: dict[str, object]) -> dict[str, object]:
        return {"prompt": row["day"].strftime("%d"), "output": ",".join(map(str, row["steps"]))}

    path = write_parquet(tmp_path / "rows.parquet", {"day": pd.Timestamp("2020-03-04"), "steps": [1, 2]})
    for data in (path, Dataset.from_parquet(path)):
        assert encode(data, row_transform=transform).dataset["input_ids"][:] == [[48, 52, 49, 44, 50, 128]]


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (raise_held_back, "`row_transform` failed: HeldBackError: not today"),
        (lambda row: None, "`row_transform` returned None, expected a dictionary."),
        (lambda row: "a", "`row_transform` returned 'a', expected a dictionary."),
        (lambda row: {1: "a", "prompt": "b"}, "no value for `output` (`output_field`). The row has ['1', 'prompt']."),
    ],
)
def test_a_transform_that_fails_is_named_with_file_and_line(tmp_path, transform, words):
    path = write(tmp_path / "rows.jsonl", '\n{"prompt": "a", "output": "b"}\n')
    assert refusal(path, row_transform=transform) == f"line 2 of {path}: {words}"


def test_the_failure_of_a_transform_keeps_its_traceback():
    with pytest.raises(ValueError, match="HeldBackError") as caught:
        encode(ROWS, row_transform=raise_held_back)
    assert isinstance(caught.value.__cause__, HeldBackError)
    assert traceback.extract_tb(caught.value.__cause__.__traceback__)[-1].name == "raise_held_back"


# -- plain columns in the chat template --------------------------------------------------------------------------------


def test_as_chat_makes_turns_of_prompt_and_output():
    tokenizer = chat_tokenizer(CHATML)
    row = {"instruction": "2+2?", "output": "4.", "system": "Be brief.", "ground_truth": "4"}
    for columns in ({"prompt_field": "instruction"}, {"prompt_template": "{instruction}"}):
        plain, chat = encode([row], tokenizer, **columns), encode([row], tokenizer, **columns, as_chat=True)
        (expected,) = encode([{"messages": [SYSTEM, *LONG[:2]], "ground_truth": "4"}], tokenizer).dataset
        assert chat.dataset[0] == expected
        assert responses(chat.dataset[0], tokenizer) == ["4.<|im_end|>"]
        assert plain.dataset["prompt"][:] == ["2+2?"]
    (without,) = encode([{"prompt": "2+2?", "output": "4."}], tokenizer, as_chat=True).dataset
    assert without["input_ids"] == tokenizer.apply_chat_template(LONG[:2])["input_ids"]


def test_as_chat_leaves_conversations_as_they_are():
    tokenizer = chat_tokenizer(CHATML)
    for row in ({"messages": LONG}, {"prompt": LONG[:3], "completion": LONG[3:]}):
        assert encode([row], tokenizer, as_chat=True).dataset[:] == encode([row], tokenizer).dataset[:]


def test_as_chat_prompts_a_model_as_it_was_taught_whatever_the_output():
    row = {"question": "2+2?", "system": "Be brief.", "output": 3}
    rendered = RowFormat(prompt_field="question", as_chat=True).render_prompt(row)
    assert rendered == ChatRow(Conversation([SYSTEM, user("2+2?")], num_prompt_messages=2), None)


def test_as_chat_names_a_column_that_is_not_there():
    assert refusal([{"prompt": "a"}], as_chat=True) == (
        "row 1 of `train_data`: no value for `output` (`output_field`). The row has ['prompt']."
    )
    with pytest.raises(TypeError, match="`as_chat` is 'yes' of type str, expected true or false"):
        RowFormat(as_chat="yes")


# -- preferences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "b"),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, "b"),
        ({"chosen": LONG[:2], "rejected": LONG[:2]}, "4."),
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {},
            },
            "b",
        ),
    ],
)
def test_preferences_are_told_what_they_are_and_the_chosen_answer_can_be_learnt(row, answer):
    tokenizer = chat_tokenizer(CHATML)
    assert refusal([row], tokenizer=tokenizer) == (
        "row 1 of `train_data`: the row has `chosen` and `rejected`, a preference between two outputs, but only one "
        "output can be learnt. To learn the chosen one, set `row_transform` to `lightning_sft.chosen_row`."
    )
    (learnt,) = encode([row], tokenizer, row_transform=chosen_row).dataset
    assert learnt["output"] == answer
    assert encode([row | {"messages": LONG, "conversations": None}], tokenizer).dataset["output"][:] == ["6!"]
    assert RowFormat().render_prompt({"prompt": "a", "chosen": "b", "rejected": "c"}) == PlainRow("a", "", None)


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, ("system", "tools", "input", "context")),
        ({"as_chat": True}, ("input", "context")),
        ({"prompt_template": "{system} {prompt} {input} {context} {tools}"}, ()),
        ({"prompt_field": "input"}, ("system", "tools", "context")),
        ({"row_transform": dict}, ()),
    ],
)
def test_columns_that_people_mean_to_be_used_are_known_where_they_are_not(options, unused):
    row = {"prompt": "a", "output": "b", "system": "c", "input": "d", "context": "e", "tools": "[]", "history": []}
    row_format = RowFormat(**options)
    assert row_format.render(row).unused_columns == row_format.render_prompt(row).unused_columns == unused


def test_pictures_are_told_also_where_a_transform_has_seen_them():
    for row in ({"instruction": "a", "output": "b"}, {"messages": LONG}):
        rendered = RowFormat(row_transform=alpaca_row).render({**row, "images": ["c.png"]})
        assert rendered.unused_columns == ("images",)


def test_an_output_that_feedback_says_false_of_is_told():
    for answer in ({"output": "b"}, {"prompt": [user("a")], "completion": [assistant("b")]}):
        rows = [{"prompt": "a", **answer, **label} for label in ({"label": False}, {"kto_tag": False}, {"label": True})]
        unused = [RowFormat().render(row).unused_columns for row in rows]
        assert unused == [("label",), ("kto_tag",), ()]
    assert RowFormat().render({"prompt": "a", "output": "b", "label": 0}).unused_columns == ()


def test_a_weight_of_a_row_is_told():
    for answer in ({"output": "b"}, {"prompt": [user("a")], "completion": [assistant("b")]}):
        rows = [{"prompt": "a", **answer, "weight": weight} for weight in (0.3, 1.0)]
        assert [RowFormat().render(row).unused_columns for row in rows] == [("weight",), ()]
