"""Conversations in every spelling: what is read from which column, and how what is malformed is named."""

import json
import re

import datasets
import pytest
from support.chat import (
    CALL,
    CALLED,
    CHATML,
    LLAMA3,
    LONG,
    QWEN,
    SYSTEM,
    TOOL,
    WITH_TOOLS,
    assistant,
    chat_tokenizer,
    encode,
    responses,
    user,
)

from lightning_sft.data.chat.conversation import Conversation, read_conversation
from lightning_sft.data.rows.sources import own_keys
from lightning_sft.data.stream.row_stream import open_streams


def test_tool_calls_are_learnt_and_tool_results_are_not():
    tokenizer = chat_tokenizer(QWEN)
    as_text = {"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    texts = [WITH_TOOLS[0], {**WITH_TOOLS[1], "tool_calls": json.dumps([as_text])}, *WITH_TOOLS[2:]]
    rows = [{"messages": WITH_TOOLS, "tools": [TOOL]}, {"messages": json.dumps(texts), "tools": json.dumps([TOOL])}]
    first, second = encode(rows, tokenizer)
    assert responses(first, tokenizer) == [CALLED, "It is 3.<|im_end|>"]
    assert json.dumps(TOOL) in first["prompt"]
    assert "<tool_response>\n3\n</tool_response>" in first["prompt"]
    assert first["input_ids"] == second["input_ids"]

    (call,) = encode([{"messages": WITH_TOOLS[:2], "tools": [TOOL]}], tokenizer)
    assert responses(call, tokenizer) == [CALLED]
    assert call["ground_truth"] == call["output"] == CALLED.removesuffix("<|im_end|>")


def test_no_row_of_a_table_gets_the_arguments_of_another_ones_tool_calls(tmp_path):
    """Arrow unites their keys. A None within a list is the row's own."""
    tokenizer = chat_tokenizer("{{ date }}:" + QWEN)

    def row(name, arguments, **more):
        tool = {"function": {"name": name, "parameters": {"enum": ["a", None], **dict.fromkeys(arguments, "x")}}}
        call = {"function": {"name": name, "arguments": arguments}}
        messages = [user("?"), assistant(None, tool_calls=[call])]
        return {"messages": messages, "tools": [tool], "chat_template_kwargs": more}

    rows = [
        row("weather", {"city": "Rome"}, mood="good"),
        row("add", {"a": 1, "b": {"c": 2}}, date="now"),
        row("f", {}),
    ]
    expected = encode(rows, tokenizer, chat_template_kwargs={"date": "one"})
    assert '"arguments": {"city": "Rome"}}' in expected["output"][0]
    table = datasets.Dataset.from_list(rows)
    path = str(tmp_path / "rows.parquet")
    table.to_parquet(path)
    streamed = [row for _, row in open_streams(path, "train_data")[0].read()]
    for source in (table, path, streamed):
        assert encode(source, tokenizer, chat_template_kwargs={"date": "one"})["input_ids"] == expected["input_ids"]


def test_a_none_stays_where_it_is_the_rows_own_and_where_no_template_writes_it():
    row = {"tools": [{"default": None}], "meta": {"source": None}, "system": None}
    if hasattr(datasets, "Json"):  # younger than the oldest version allowed
        assert own_keys(row, datasets.Features({"tools": [datasets.Json()]})) == row
    assert own_keys(row, None) == {**row, "tools": [{}]}


def test_sharegpt_and_text_parts_are_other_spellings_of_the_same():
    tokenizer = chat_tokenizer(QWEN)
    sharegpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "1+2?"},
        {"from": "gpt", "value": "3"},
        {"from": "observation", "value": "x"},
        {"from": "gpt", "value": "y"},
    ]
    openai = [
        SYSTEM,
        user([{"type": "text", "text": "1+"}, {"type": "text", "text": "2?"}]),
        assistant("3"),
        {"role": "tool", "content": "x"},
        assistant("y"),
    ]
    first, second = encode([{"conversations": sharegpt}, {"messages": openai}], tokenizer)
    assert first["input_ids"] == second["input_ids"]
    assert responses(first, tokenizer) == ["3<|im_end|>", "y<|im_end|>"]


def test_of_a_prompt_and_a_completion_only_the_completion_is_learnt():
    tokenizer = chat_tokenizer(LLAMA3)
    rows = [
        {"prompt": LONG[:3], "completion": [LONG[3], user("?"), assistant("!")]},
        {"prompt": LONG[:3], "output": "6!"},
        {"prompt": "2+2?", "output": [assistant("4.")]},
        {"prompt": "2+2?", "output": "4."},
    ]
    first, second, third, plain = encode(rows, tokenizer)
    assert responses(first, tokenizer) == ["6!<|eot_id|>", "!<|eot_id|>"]
    assert responses(second, tokenizer) == ["6!<|eot_id|>"]
    assert third["input_ids"] == tokenizer.apply_chat_template(LONG[:2])["input_ids"]
    assert responses(plain, tokenizer) == ["4.<eos>"]  # no message anywhere: no conversation
    (last,) = encode(rows[:1], tokenizer, train_on_turns="last")
    assert responses(last, tokenizer) == ["!<|eot_id|>"]


def test_a_column_of_its_own_may_hold_the_system_turn():
    tokenizer = chat_tokenizer(CHATML)
    sharegpt = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4."}]
    rows = [
        {"messages": [SYSTEM, *LONG[:2]]},
        {"conversations": sharegpt, "system": "Be brief."},
        {"messages": [SYSTEM, *LONG[:2]], "system": "Be brief."},
        {"prompt": LONG[:1], "completion": LONG[1:2], "system": "Be brief."},
    ]
    expected, *others = encode(rows, tokenizer)
    for other in others:
        assert (other["input_ids"], other["excluded_spans"]) == (expected["input_ids"], expected["excluded_spans"])
        assert other["num_prompt_tokens"] == expected["num_prompt_tokens"]
    without, empty = encode([{"conversations": sharegpt}, {"conversations": sharegpt, "system": ""}], tokenizer)
    assert without["input_ids"] == empty["input_ids"] != expected["input_ids"]

    with pytest.raises(
        ValueError, match=r"row 1 .*`system` is 'Be long.', but turn 1 \(system\) is 'Be brief.'. Remove"
    ):
        encode([{**rows[0], "system": "Be long."}], tokenizer)
    with pytest.raises(ValueError, match=r"row 1 .*`system` is 3 of type int, expected a string."):
        encode([{**rows[0], "system": 3}], tokenizer)


def test_messages_are_left_alone_where_columns_are_named():
    row = {"messages": LONG, "question": "a", "output": "b"}
    for named in ({"prompt_field": "question"}, {"prompt_template": "{question}"}):
        assert encode([row], chat_tokenizer(CHATML), **named)["prompt"] == ["a"]


def test_the_row_and_the_options_give_the_template_more_to_use():
    tokenizer = chat_tokenizer("{{ date }}:" + CHATML)
    rows = [{"messages": LONG}, {"messages": LONG, "chat_template_kwargs": {"date": "two"}}]
    prompts = encode(rows, tokenizer, chat_template_kwargs={"date": "one"})["prompt"]
    assert [prompt.partition(":")[0] for prompt in prompts] == ["one", "two"]


def test_empty_columns_of_a_table_are_no_tools_and_no_variables():
    empty = dict.fromkeys(["tools", "functions", "system", "chat_template_kwargs"], "")
    messages = json.dumps(WITH_TOOLS[:1])
    assert read_conversation({"messages": messages, **empty}, ["messages"]) == Conversation(WITH_TOOLS[:1])


@pytest.mark.parametrize("name", ["tools", "continue_final_message", "add_generation_prompt"])
def test_what_says_how_the_template_is_called_is_nothing_for_it_to_use(name):
    tokenizer, words = chat_tokenizer(CHATML), f"`chat_template_kwargs` has `{name}`, which tells `transformers`"
    with pytest.raises(ValueError, match=f"row 1 of `train_data`: {words}"):
        encode([{"messages": LONG, "chat_template_kwargs": {name: True}}], tokenizer)
    with pytest.raises(ValueError, match=f"^{words}"):
        encode([{"messages": LONG}], tokenizer, chat_template_kwargs={name: True})


BAD_MESSAGES = {
    "no turn of the assistant": (
        [user("a")],
        "no turn of the assistant to learn from among 1 message. Remove the row.",
    ),
    "an empty list": ([], "`messages` has no messages; expected at least one."),
    "no list": ("hello", "`messages` is 'hello', which is not JSON"),
    "no object": (["a"], "`messages`, turn 1 is 'a', expected an object with `role` and `content`."),
    "an unknown role": (
        [user("a"), {"role": "wizard", "content": "b"}],
        "turn 2 has the role 'wizard', expected one of",
    ),
    "no role": ([{"content": "b"}], "turn 1 has the role None"),
    "a number": ([user(3)], "turn 1 (user) has the content 3, expected a string."),
    "an object": (
        [user("a"), {"role": "tool", "content": {"b": 1}}, assistant("c")],
        "turn 2 (tool) has the content {'b': 1}, expected a string. Write the object as JSON text.",
    ),
    "no content": ([user("a"), assistant(None)], "turn 2 (assistant) has the content None"),
    "tool calls that are none": ([user("a"), assistant(None, tool_calls="null")], "turn 2 (assistant) has the content"),
    "an image": (
        [user([{"type": "image"}])],
        "turn 1 (user) has the content part {'type': 'image'}, expected text parts only.",
    ),
    "arguments that are no JSON": (
        [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
        "`messages`, turn 2, arguments is '{', which is not JSON",
    ),
    "a share of a turn": (
        [user("a"), assistant("b", weight=0.5)],
        "`messages`, turn 2 (assistant) has the `weight` 0.5, expected 1 (or true), or 0 (or false) for a turn "
        "that is not to be learnt.",
    ),
    "a switch of text": (
        [user("a"), assistant("b", train="no")],
        "`messages`, turn 2 (assistant) has the `train` 'no', expected 1 (or true), or 0 (or false)",
    ),
    "switches that contradict each other": (
        [user("a"), assistant("b", train=True, loss=0)],
        "turn 2 (assistant) has the `train` True, but the `loss` 0. Remove one.",
    ),
    "a user to learn from": (
        [{**user("a"), "loss_mask": 1}, assistant("b")],
        "turn 1 (user) has the `loss_mask` 1, but only turns of the assistant are learnt. Remove it.",
    ),
    "calls in two spellings": (
        [user("a"), assistant("", tool_calls=[CALL], function_call=CALL)],
        "turn 2 has calls in `tool_calls` and in `function_call`. Remove one.",
    ),
    "a turn of a call without one": (
        [user("a"), {"from": "function_call", "value": "add"}],
        "`messages`, turn 2, content is 'add', which is not JSON",
    ),
    "a call without a name": (
        [user("a"), assistant("", tool_calls=[{"function": {"arguments": "{}"}}])],
        "turn 2 has the tool call {'function': {'arguments': '{}'}}, expected one with the `name` of a function.",
    ),
    "reasoning twice": (
        [user("a"), assistant([{"type": "thinking", "thinking": "b"}], reasoning="c")],
        "turn 2 (assistant) has reasoning in `content` and in `reasoning`. Remove one.",
    ),
    "reasoning that is no text": (
        [user("a"), assistant("b", thinking=True)],
        "turn 2 (assistant) has the `thinking` True, expected a string.",
    ),
    "reasoning after the answer": (
        [user("a"), assistant([{"type": "text", "text": "b"}, {"type": "thinking", "thinking": "c"}])],
        "turn 2 (assistant) has the content part {'type': 'thinking', 'thinking': 'c'}, expected text parts only.",
    ),
    "a call that is learnt after words that are not": (
        [user("a"), assistant("b", weight=0), {"role": "tool_call", "content": '{"name": "f"}'}],
        "turn 3 (assistant) continues the turn before it, but only one of them is to be learnt",
    ),
    "no weight anywhere": (
        [user("a"), assistant("b", weight=0), assistant("c", weight=0)],
        "no turn of the assistant to learn from: each has the `weight` 0 (or `train` false, or similar).",
    ),
    "the assistant first": ([assistant("a"), user("b")], "turn 1 (assistant) has nothing before it"),
    "a lone surrogate": (
        [user("a\ud800"), assistant("b")],
        "the conversation holds a lone surrogate, which is not text",
    ),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_named_by_row_and_turn(name):
    messages, words = BAD_MESSAGES[name]
    with pytest.raises(ValueError, match=f"row 2 of `train_data`: .*{re.escape(words)}"):
        encode([{"messages": LONG}, {"messages": messages}], chat_tokenizer(CHATML))
