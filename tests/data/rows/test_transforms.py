"""Rows in the forms of other programs: what ready transforms make of them, and how they are learnt."""

import pytest
from support.chat import CHATML, LONG, SYSTEM, assistant, chat_tokenizer, encode, responses, user

from lightning_sft import SFTDataModule, alpaca_row, chosen_row, query_row

HISTORY = [["2+2?", "4."]]


@pytest.mark.parametrize(
    ("transform", "row", "expected"),
    [
        (alpaca_row, {"instruction": "a", "output": "b"}, [user("a"), assistant("b")]),
        (alpaca_row, {"instruction": "a", "input": "x", "output": "b"}, [user("a\nx"), assistant("b")]),
        (alpaca_row, {"instruction": "", "input": "x", "output": ""}, [user("x"), assistant("")]),
        (
            alpaca_row,
            {"instruction": "3+3?", "input": None, "output": "6!", "system": "Be brief.", "history": HISTORY},
            [SYSTEM, *LONG],
        ),
        (alpaca_row, {"instruction": "a", "input": "", "system": "", "history": None}, [user("a")]),
        (alpaca_row, {"instruction": "a", "context": "x", "response": "b"}, [user("a\nx"), assistant("b")]),  # Dolly
        (
            alpaca_row,
            {"instruction": "a", "output": "b", "system_prompt": "Be brief."},
            [SYSTEM, user("a"), assistant("b")],
        ),
        (query_row, {"query": "a", "response": "b"}, [user("a"), assistant("b")]),
        (query_row, {"query": "3+3?", "response": "6!", "system": "Be brief.", "history": HISTORY}, [SYSTEM, *LONG]),
        (chosen_row, {"chosen": LONG, "rejected": LONG[:3]}, LONG),
        (
            chosen_row,
            {"instruction": "a", "input": "x", "chosen": "b", "rejected": "c"},
            [user("a\nx"), assistant("b")],
        ),
        (chosen_row, {"prompt": "2+2?", "chosen": LONG[:2], "rejected": LONG[:1]}, LONG[:2]),
        (chosen_row, {"conversations": LONG[:1], "chosen": LONG[1], "rejected": LONG[1]}, LONG[:2]),
        (chosen_row, {"messages": LONG[:1], "chosen": "4.", "rejected": "5."}, LONG[:2]),
        (chosen_row, {"messages": LONG[:2], "chosen": LONG, "rejected": LONG}, LONG),
    ],
)
def test_a_row_becomes_a_conversation_and_keeps_what_else_it_has(transform, row, expected):
    kept = {name: row[name] for name in row if name == "prompt"}
    given = {**row, "ground_truth": "7"}
    assert transform(given) == {**kept, "ground_truth": "7", "messages": expected}
    assert given == {**row, "ground_truth": "7"}


def test_a_chosen_answer_without_its_question_is_the_output():
    for chosen, question in (("b", "a"), ([assistant("b")], [user("a")])):
        rest = {"prompt": question, "instruction": "x", "input": ""}  # of which the prompt was made
        assert chosen_row({**rest, "chosen": chosen, "rejected": "c"}) == {**rest, "output": chosen}


def test_answers_of_the_history_are_learnt_unless_only_the_last_turn_is():
    tokenizer = chat_tokenizer(CHATML)
    rows = [{"instruction": "3+3?", "output": "6!", "history": HISTORY}]
    (row,) = encode(rows, tokenizer, row_transform=alpaca_row)
    assert responses(row, tokenizer) == ["4.<|im_end|>", "6!<|im_end|>"]
    (row,) = encode(rows, tokenizer, row_transform=alpaca_row, train_on_turns="last")
    assert responses(row, tokenizer) == ["6!<|im_end|>"]


def test_a_transform_s_rows_prompt_a_model_with_or_without_an_answer():
    rows = [{"query": "a", "response": "b"}, {"query": "c"}, {"query": "d", "response": None}]
    data = SFTDataModule(chat_tokenizer(CHATML), predict_data=rows, row_transform=query_row)
    data.setup("predict")
    first, *others = data.prompts("predict")
    assert first.text.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert [prompt.ground_truth for prompt in (first, *others)] == ["b", None, None]


@pytest.mark.parametrize("transform", [alpaca_row, query_row, chosen_row])
def test_a_conversation_of_another_file_stays_as_it_is(transform):
    row = {"instruction": None, "query": None, "chosen": None, "conversations": LONG, "tools": []}
    assert transform(row) == row


@pytest.mark.parametrize(
    ("transform", "row", "words"),
    [
        (alpaca_row, {"output": "b"}, r"no value for `instruction`. The row has \['output'\]."),
        (query_row, {"query": None}, r"no value for `query`. The row has \['query'\]."),
        (chosen_row, {"rejected": "b"}, r"no value for `chosen`. The row has \['rejected'\]."),
        (alpaca_row, {"instruction": "a", "input": 3}, "`input` is 3 of type int, expected a string."),
        (alpaca_row, {"instruction": "a", "history": ["b"]}, r"`history`, pair 1, is 'b', expected `\[question, ans"),
        (
            alpaca_row,
            {"instruction": "a", "history": [["b", "c"], ["d", 3]]},
            "`history`, pair 2, is 3 of type int, expected a string.",
        ),
        (alpaca_row, {"instruction": "a", "output": None}, "no turn of the assistant to learn from among 1 message."),
    ],
)
def test_a_row_of_another_form_is_named_in_plain_words(transform, row, words):
    with pytest.raises(ValueError, match=f"^row 1 of `train_data`: .*{words}") as caught:
        encode([row], chat_tokenizer(CHATML), row_transform=transform)
    assert "failed" not in str(caught.value)
