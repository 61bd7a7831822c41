"""Rows of a text alone, which is learnt as a whole."""

import pytest
from support.chat import CHATML, LONG, chat_tokenizer
from support.models import character_tokenizer
from support.rows import encode, json_lines, refusal, write

from lightning_sft import SFTDataModule
from lightning_sft.data.rows.row_format import ChatRow, PlainRow, RowFormat

EOS, BOS = 128, 129


def learnt(rows, tokenizer=None, **options):
    """The ids of each row with what of them is learnt, as training has it."""
    data = SFTDataModule(tokenizer or character_tokenizer(), rows, batch_size=1, layout="padded", **options)
    data.setup("fit")
    microbatches = [microbatch for step in data.train_dataloader() for microbatch in step.microbatches]
    found = [(each.locations[0], each.labels[each.response_mask].tolist()) for each in microbatches]
    return [ids for _, ids in sorted(found)]


@pytest.mark.parametrize("streaming", [False, True])
def test_all_of_a_text_is_learnt_but_a_first_token_without_anything_before_it(tmp_path, streaming):
    path = write(tmp_path / "rows.jsonl", json_lines({"text": "abc"}))
    tokenizer = character_tokenizer(bos=True)
    for more, last in (({}, [EOS]), ({"append_eos": False}, [])):
        (without,) = encode(path, **more).dataset
        (after,) = encode(path, tokenizer, **more).dataset
        assert without["input_ids"] == [97, 98, 99, *last]
        assert after["input_ids"] == [BOS, 97, 98, 99, *last]
        assert (without["num_response_tokens"], after["num_response_tokens"]) == (2 + len(last), 3 + len(last))
    if not streaming:
        assert learnt(path) == [[98, 99, EOS]]
        assert learnt(path, tokenizer) == [[97, 98, 99, EOS]]
        return
    data = SFTDataModule(tokenizer, path, batch_size=1, streaming=True)
    data.setup("fit")
    step = next(iter(data.train_dataloader()))
    assert step.microbatches[0].input_ids.tolist() == [[BOS, 97, 98, 99]]
    assert step.totals.num_response_tokens == 4


def test_a_text_that_spells_its_own_bos_or_eos_has_each_once():
    tokenizer = character_tokenizer(bos=True)
    (row,) = encode([{"text": f"<bos>a{tokenizer.eos_token}"}], tokenizer).dataset
    assert (row["input_ids"], row["num_response_tokens"]) == ([BOS, 97, EOS], 2)


def test_a_text_has_no_reference_answer_of_its_own():
    assert RowFormat().render({"text": "a"}) == PlainRow("", "a", None, is_whole=True)
    assert RowFormat().render({"text": "a", "ground_truth": "b"}) == PlainRow("", "a", "b", is_whole=True)


def test_a_text_is_gone_on_from_by_predict_and_made_anew_by_validation():
    rows = [{"text": "abc"}]
    data = SFTDataModule(character_tokenizer(), rows, val_data=rows, predict_data=rows)
    for stage, prompt in (("fit", ""), ("predict", "abc")):
        data.setup(stage)
        assert [(each.text, each.ground_truth) for each in data.prompts(stage)] == [(prompt, None)]
    assert "response token" in str(data.preview(1))


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "a", "prompt": "b", "output": "c"}, {}, PlainRow("b", "c", "c")),
        ({"text": "a", "prompt": "b", "completion": "c"}, {}, PlainRow("b", "c", "c")),
        ({"text": "a", "prompt": None, "output": None}, {}, PlainRow("", "a", None, is_whole=True)),
        (
            {"content": "a", "prompt": "b", "output": "c"},
            {"text_field": "content"},
            PlainRow("", "a", None, is_whole=True),
        ),
        ({"text": "a", "q": "b", "output": "c"}, {"prompt_field": "q"}, PlainRow("b", "c", "c")),
        ({"text": "a", "messages": LONG}, {"text_field": "text"}, PlainRow("", "a", None, is_whole=True)),
        ({"prompt": "b", "response": "c", "messages": LONG}, {"output_field": "response"}, PlainRow("b", "c", "c")),
    ],
)
def test_a_prompt_and_an_output_come_first_unless_a_column_is_named(row, options, expected):
    assert RowFormat(**options).render(row) == expected


def test_a_row_with_messages_alone_is_a_conversation_though_other_rows_have_a_named_output():
    assert isinstance(RowFormat(output_field="response").render({"messages": LONG}), ChatRow)


def test_messages_come_before_a_text():
    rows = encode([{"messages": LONG, "text": "a"}, {"text": "a"}], chat_tokenizer(CHATML)).dataset
    assert rows["as_written"][:] == [True, False]


def test_completion_is_an_output_by_default_and_output_comes_first():
    row = {"prompt": "a", "completion": "b"}
    assert RowFormat().render(row) == PlainRow("a", "b", "b")
    assert RowFormat().render(row | {"output": "c"}) == PlainRow("a", "c", "c")
    assert RowFormat(prompt_template="{prompt}!").render(row) == PlainRow("a!", "b", "b")
    assert RowFormat().render_prompt(row) == PlainRow("a", "", None)
    assert refusal([row], output_field="answer").startswith("row 1 of `train_data`: no value for `answer`")
    (chat,) = encode([row], chat_tokenizer(CHATML), as_chat=True).dataset
    assert (chat["output"], chat["as_written"]) == ("b", True)


def test_texts_and_other_rows_are_mixed_and_cut(tmp_path):
    text = write(tmp_path / "a.jsonl", json_lines({"text": "abcdefgh"}, {"text": "ab"}))
    pairs = write(tmp_path / "b.jsonl", json_lines({"prompt": "x", "output": "y"}))
    cut = {"max_length": 4, "too_long": "truncate"}
    assert learnt([text, pairs], **cut) == [[98, 99, 100], [121, EOS], [98, EOS]]
    data = SFTDataModule(character_tokenizer(), {text: 2, pairs: 1}, batch_size=1, **cut)
    data.setup("fit")
    assert data.training_rows.count_steps() == 5


HINTS = {
    "question and answer": (
        {"question": "a", "answer": "b"},
        {},
        " Set `prompt_field` to `question` and `output_field` to `answer`.",
    ),
    "prompt and response": ({"prompt": "a", "response": "b"}, {}, " Set `output_field` to `response`."),
    "question and output": ({"question": "a", "output": "b"}, {}, " Set `prompt_field` to `question`."),
    "instruction": ({"instruction": "a", "output": "b"}, {}, " Set `row_transform` to `lightning_sft.alpaca_row`."),
    "Dolly": (
        {"instruction": "a", "context": "b", "response": "c"},
        {},
        " Set `row_transform` to `lightning_sft.alpaca_row`.",
    ),
    "messages that are not asked for": (
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt_field": "q"},
        " `messages` has messages: leave out the arguments that name other columns.",
    ),
    "query": ({"query": "a", "response": "b"}, {}, " Set `row_transform` to `lightning_sft.query_row`."),
    "dialogue": (
        {"dialog": [{"role": "user", "content": "a"}]},
        {},
        " `dialog` has messages: let a `row_transform` return them as `messages`.",
    ),
    "messages and output": (
        {"input": [{"role": "user", "content": "a"}], "output": "b"},
        {},
        " `input` has messages: set `prompt_field` to `input`.",
    ),
    "inputs": ({"inputs": "a", "targets": "b"}, {}, " Set `prompt_field` to `inputs` and `output_field` to `targets`."),
    "nothing known": ({"a": "b"}, {}, ""),
    "answer alone": ({"answer": "b"}, {}, ""),
    "another prompt": ({"q": "a", "answer": "b"}, {"prompt_field": "q"}, " Set `output_field` to `answer`."),
    "template": ({"q": "a", "answer": "b"}, {"prompt_template": "{q}"}, " Set `output_field` to `answer`."),
}


@pytest.mark.parametrize("columns", HINTS)
def test_a_row_without_the_default_columns_is_told_which_settings_use_those_it_has(columns):
    row, options, hint = HINTS[columns]
    message = refusal([row], **options)
    assert message.endswith(f"The row has {sorted(row)!r}.{hint}")
