"""Other spellings of conversations: names of roles, calls, tools, and switches that leave a turn out."""

import json

import datasets
import pytest
from support.chat import (
    CALLED,
    CHATML,
    LONG,
    QWEN,
    THINKING,
    TOOL,
    WITH_TOOLS,
    assistant,
    chat_tokenizer,
    encode,
    responses,
    user,
)


@pytest.mark.parametrize(
    ("asks", "answers", "reports"),
    [
        ("human", "gpt", "observation"),
        ("user", "model", "function_response"),
        ("user", "bot", "function"),
        ("human", "ai", "ipython"),
        ("human", "chatgpt", "environment"),
        ("user", "assistant", "tool_response"),
    ],
)
def test_each_name_of_a_role_means_the_same(asks, answers, reports):
    tokenizer = chat_tokenizer(QWEN)
    turns = [(asks, "user", "1+2?"), (answers, "assistant", "3"), (reports, "tool", "x"), (answers, "assistant", "y")]
    named = [{"role": name, "content": text} for name, _, text in turns]
    sharegpt = [{"from": name, "value": text} for name, _, text in turns]
    usual = [{"role": role, "content": text} for _, role, text in turns]
    rows = [{"conversation": named}, {"conversation": json.dumps(sharegpt)}, {"messages": usual}]
    first, second, third = encode(rows, tokenizer)
    assert first["input_ids"] == second["input_ids"] == third["input_ids"]
    assert responses(first, tokenizer) == responses(third, tokenizer) == ["3<|im_end|>", "y<|im_end|>"]


BARE_CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
TEXT_CALL = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
OTHER_CALLS = {
    "OpenAI's older call": [
        WITH_TOOLS[0],
        {"role": "assistant", "content": None, "function_call": TEXT_CALL},
        {"role": "function", "name": "add", "content": "3"},
        WITH_TOOLS[3],
    ],
    "a call without its type": [WITH_TOOLS[0], assistant(None, tool_calls=[BARE_CALL]), *WITH_TOOLS[2:]],
    "ShareGPT's turn of a call": [
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": json.dumps(BARE_CALL)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ],
    "ms-swift's turn of a call": [
        WITH_TOOLS[0],
        {"role": "tool_call", "content": json.dumps(BARE_CALL)},
        {"role": "tool_response", "content": "3"},
        WITH_TOOLS[3],
    ],
    "ShareGPT's turn of several calls": [
        WITH_TOOLS[0],
        {"from": "function_call", "value": json.dumps([TEXT_CALL])},
        *WITH_TOOLS[2:],
    ],
}


@pytest.mark.parametrize("spelling", OTHER_CALLS)
def test_calls_and_tools_in_older_spellings_are_written_like_todays(spelling):
    needs_type = "{{ raise_exception('no type') if c.type != 'function' }}{{ c.function.name }}"
    tokenizer = chat_tokenizer(QWEN.replace("{{ c.function.name }}", needs_type))
    (expected,) = encode([{"messages": WITH_TOOLS, "tools": [TOOL]}], tokenizer)
    functions = [{"functions": [TOOL["function"]]}, {"tools": json.dumps([TOOL["function"]])}, {"functions": [TOOL]}]
    as_text = {**TOOL["function"], "parameters": json.dumps(TOOL["function"]["parameters"])}  # as axolotl allows
    functions.append({"tools": [{"type": "function", "function": as_text}]})
    functions += [{"tools": [json.dumps(TOOL)]}, {"tools": [{"type": "function", **TOOL["function"]}]}]
    for tools in functions:
        (row,) = encode([{"messages": OTHER_CALLS[spelling], **tools}], tokenizer)
        assert row["input_ids"] == expected["input_ids"]
        assert responses(row, tokenizer) == responses(expected, tokenizer) == [CALLED, "It is 3.<|im_end|>"]


def test_turns_of_calls_continue_the_turn_before_them():
    """As in ms-swift: a model makes these calls at once, after what it says first."""
    calls = [{"name": "add", "arguments": {"a": number}} for number in (1, 2)]
    split = [{"role": "tool_call", "content": json.dumps(call), "loss": True} for call in calls]
    tokenizer = chat_tokenizer(QWEN)
    for words in ([], [assistant("Wait.")]):
        said = words[0]["content"] if words else None
        joined = [user("?"), assistant(said, tool_calls=calls), *WITH_TOOLS[2:]]
        first, second = encode(
            [{"messages": [user("?"), *words, *split, *WITH_TOOLS[2:]]}, {"messages": joined}], tokenizer
        )
        assert first["input_ids"] == second["input_ids"]
        assert responses(first, tokenizer) == responses(second, tokenizer)
        assert responses(first, tokenizer)[0].startswith(said or "<tool_call>")


def test_a_call_of_a_function_without_arguments_may_have_an_empty_text_for_them():
    call = {"function": {"name": "now", "arguments": ""}}
    (row,) = encode([{"messages": [user("?"), assistant(None, tool_calls=[call])]}], tokenizer := chat_tokenizer(QWEN))
    assert responses(row, tokenizer) == ['<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>']


THOUGHT_PARTS = {
    "Mistral's texts": {"content": [{"type": "thinking", "thinking": "easy"}, {"type": "text", "text": "4."}]},
    "Mistral's parts": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "easy"}]},
            {"type": "text", "text": "4."},
        ]
    },
    "axolotl's parts": {
        "content": [{"type": "text", "value": "4."}],
        "reasoning_content": [{"type": "text", "text": "ea", "train": True}, {"type": "text", "content": "sy"}],
    },
}


@pytest.mark.parametrize("spelling", THOUGHT_PARTS)
def test_reasoning_in_parts_is_learnt_as_its_text(spelling):
    tokenizer = chat_tokenizer(THINKING)
    (row,) = encode([{"messages": [user("2+2?"), {"role": "assistant", **THOUGHT_PARTS[spelling]}]}], tokenizer)
    assert responses(row, tokenizer) == ["<think>easy</think>4.<|im_end|>"]


MAGISTRAL = (
    "Write thoughts, then the response.{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '[THINK]' + part.thinking + '[/THINK]' }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_takes_reasoning_in_parts_is_given_it_so():
    tokenizer = chat_tokenizer(MAGISTRAL)
    rows = [{"messages": [user("2+2?"), {"role": "assistant", **turn}]} for turn in THOUGHT_PARTS.values()]
    rows.append({"messages": [user("2+2?"), assistant("4."), user("3+3?"), assistant("6!", thinking="hard")]})
    *same, two = encode(rows, tokenizer)
    assert [responses(row, tokenizer) for row in same] == [["[THINK]easy[/THINK]4.<eos>"]] * 3
    assert responses(two, tokenizer) == ["4.<eos>", "[THINK]hard[/THINK]6!<eos>"]


OLMO = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.function_calls if m.function_calls }}")


@pytest.mark.parametrize("role", ["tool", "environment"])
def test_calls_as_text_and_results_of_the_environment_are_written_as_olmos_template_has_them(role):
    environment = OLMO.replace("{{ m.role }}", "{{ {'environment': 'Env', 'user': 'U'}[m.role] or m.role }}")
    row = {"messages": [user("a"), assistant(None, function_calls="f(a=1)"), {"role": role, "content": "3"}, LONG[1]]}
    for template, name in ((OLMO, "tool"), (environment, "Env"), (f"{environment}{{{{ '' if 'tool' }}}}", "tool")):
        tokenizer = chat_tokenizer(template)
        (learnt,) = encode([row], tokenizer)
        assert responses(learnt, tokenizer) == ["f(a=1)<|im_end|>", "4.<|im_end|>"]
        assert f"<|im_start|>{name}\n3<|im_end|>" in learnt["prompt"]
    with pytest.raises(ValueError, match=r"turn 2 \(assistant\) has the `function_calls` 'f\(a=1\)', which the chat"):
        encode([row], chat_tokenizer(CHATML))


def test_a_part_of_a_turn_is_not_left_out():
    row = {
        "messages": [user("a"), assistant("bcd", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])]
    }
    with pytest.raises(
        ValueError, match=r"row 1 .*turn 2 \(assistant\) has the `train_detail` .* as a whole or not at"
    ):
        encode([row], chat_tokenizer(CHATML))
    row["messages"][1]["train_detail"] = []
    assert len(encode([row], chat_tokenizer(CHATML))) == 1


@pytest.mark.parametrize("name", ["content", "reasoning_content"])
def test_a_part_of_a_text_is_not_left_out(name):
    for switch, off in (("train", False), ("weight", 0), ("weight", 0.5)):
        turn = assistant("b") | {name: [{"type": "text", "text": "a"}, {"type": "text", "text": "b", switch: off}]}
        words = rf"turn 2 \(assistant\) has a content part with the `{switch}` {off}, but a turn is learnt as a whole"
        with pytest.raises(ValueError, match=words):
            encode([{"messages": [user("a"), turn]}], chat_tokenizer(THINKING))
    asked = user([{"type": "text", "text": "a", "train": False}])
    assert len(encode([{"messages": [asked, assistant("b")]}], chat_tokenizer(CHATML))) == 1


def test_no_row_of_a_table_gets_the_arguments_of_another_ones_older_call():
    def row(name, **arguments):
        call = {"name": name, "arguments": arguments}
        return {
            "messages": [user("?"), assistant(None, function_call=call)],
            "functions": [{"name": name, **arguments}],
        }

    rows, tokenizer = [row("weather", city="Rome"), row("add", a=1)], chat_tokenizer(QWEN)
    expected = encode(rows, tokenizer)["input_ids"]
    assert encode(datasets.Dataset.from_list(rows), tokenizer)["input_ids"] == expected


@pytest.mark.parametrize(
    "switch", ["weight", "train", "trainable", "training", "loss_mask", "loss_weight", "loss_scale"]
)
def test_a_turn_is_left_out_by_any_switch_which_no_template_sees(switch):
    tokenizer = chat_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content }} {{ m.keys() | join }}"))
    for on, off in ((1, 0), (True, False), (None, 0.0)):
        turns = [{**user("a"), switch: off}, assistant("b", **{switch: off}), user("c"), assistant("d", **{switch: on})]
        (row,) = encode([{"messages": turns}], tokenizer)
        assert responses(row, tokenizer) == ["d rolecontent<|im_end|>"]
        assert switch == "weight" or switch not in row["prompt"]
    agreeing = [user("a"), assistant("b", train=True, loss=1), user("c"), assistant("d", train=False, loss=0)]
    (row,) = encode([{"messages": agreeing}], tokenizer)
    assert responses(row, tokenizer) == ["b rolecontent<|im_end|>"]


def test_conversations_in_two_columns_are_refused_unless_they_are_the_same():
    tokenizer = chat_tokenizer(CHATML)
    for more in ({"conversations": LONG[:2]}, {"conversation": json.dumps(LONG)}):
        with pytest.raises(
            ValueError, match=rf"row 1 .*: the row has both `messages` and `{next(iter(more))}`. Remove"
        ):
            encode([{"messages": LONG, **more}], tokenizer)
    (expected,) = encode([{"messages": LONG}], tokenizer)
    for more in ({"conversations": LONG}, {"conversations": []}, {"conversation": None}):
        (row,) = encode([{"messages": LONG, **more}], tokenizer)
        assert row["input_ids"] == expected["input_ids"]
    both = [{"messages": LONG}, {"messages": LONG, "conversations": LONG[:2]}]
    assert len(encode(both, tokenizer, bad_rows="drop")) == 1


def test_tools_in_two_spellings_and_what_is_no_tool_are_refused():
    row = {"messages": LONG, "tools": [TOOL], "functions": [TOOL["function"]]}
    with pytest.raises(ValueError, match=r"row 1 .*: the row has both `tools` and `functions`. Remove one."):
        encode([row], chat_tokenizer(QWEN))
    for column in ("tools", "functions"):
        with pytest.raises(ValueError, match=rf"row 1 .*: `{column}`, number 2 is 3 of type int, expected an object."):
            encode([{"messages": LONG, column: [TOOL, 3]}], chat_tokenizer(QWEN))
