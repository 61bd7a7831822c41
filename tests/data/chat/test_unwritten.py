"""What a row says and its chat template does not write: refused by name, or said."""

import pytest
from support.chat import (
    CHATML,
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
from support.rows import encode as encoded_rows


def refusal(messages, template, **row):
    with pytest.raises(ValueError, match=r"^row 1 of `train_data`: ") as caught:
        encode([{"messages": messages, **row}], chat_tokenizer(template))
    return str(caught.value)


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (call("add", a=1), call("add", a=2)),
        (call("get_weather"), call("get_weather")),
        (call("search_web", query="people of Paris"), call("search_web", query="Paris is")),
        (call("search_web", query="people of Paris"), call("search_web", query="of Paris")),
    ],
)
def test_a_template_that_writes_the_first_call_alone_is_found_out_whatever_the_second_says(first, second):
    only_first = QWEN.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    messages = [user("?"), assistant("", tool_calls=[first, second])]
    words = "turn 2 (assistant) has the `tool_calls` "
    assert words in refusal(messages, only_first, tools=[TOOL])
    tokenizer = chat_tokenizer(QWEN)
    (row,) = encode([{"messages": messages, "tools": [TOOL]}], tokenizer)
    assert responses(row, tokenizer)[0].count("<tool_call>") == 2


def test_a_tools_result_that_repeats_the_arguments_as_python_writes_them_changes_no_call():
    result = {"role": "tool", "content": "called with {'a': 1, 'b': 2}"}
    takes_objects = "{{ raise_exception('no object') if c.function.arguments is string }}{{ c.function.name }}"
    for template in (QWEN, QWEN.replace("{{ c.function.name }}", takes_objects)):
        tokenizer = chat_tokenizer(template)
        expected, row = encode(
            [{"messages": messages, "tools": [TOOL]} for messages in (WITH_TOOLS, [*WITH_TOOLS[:2], result, LONG[1]])],
            tokenizer,
        )
        assert responses(row, tokenizer)[0] == responses(expected, tokenizer)[0]
    joins_text = chat_tokenizer(QWEN.replace("c.function.arguments | tojson", "c.function.arguments"))
    (row,) = encode([{"messages": [*WITH_TOOLS[:2], result, LONG[1]], "tools": [TOOL]}], joins_text)
    assert responses(row, joins_text)[0] == responses(expected, tokenizer)[0]


def test_of_templates_by_name_that_without_tools_may_refuse_the_conversation():
    default = "{% if messages | selectattr('role', 'equalto', 'tool') | list %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = chat_tokenizer({"default": default + CHATML, "tool_use": QWEN})
    expected = encode([{"messages": WITH_TOOLS, "tools": [TOOL]}], chat_tokenizer(QWEN))
    assert encode([{"messages": WITH_TOOLS, "tools": [TOOL]}], tokenizer)["input_ids"] == expected["input_ids"]
    assert encode([{"messages": LONG}], tokenizer)["output"] == ["6!"]


LAST_PART = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split(MARK)[-1] }}<|im_end|>\n{% endfor %}"
LAST_PART += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("mark", "content", "left_out"),
    [
        ("</think>", "<think>\neasy\n</think>\n4.", "easy"),
        ("</think>", "<think>4.</think>4.", "4."),
        ("<|end|>", "easy as such<|end|>4.", "easy as such"),
        ("<think>", "Well then. <think>4.", "Well then."),
    ],
)
def test_what_a_template_cuts_off_before_the_answer_is_said(mark, content, left_out):
    template = LAST_PART.replace("MARK", repr(mark))
    rows = encoded_rows([{"messages": [user("2+2?"), assistant(content)]}], chat_tokenizer(template))
    (notice,) = rows.report.notices
    words = f"leaves out a part of the content of a turn that is learnt, such as its reasoning: '{left_out}'"
    assert words in notice.in_words("a row")


def test_an_answer_of_which_the_template_leaves_all_out_is_refused():
    template = LAST_PART.replace("MARK", repr("</think>"))
    words = "turn 2 (assistant) has the `content` 'easy', which the chat template does not write"
    assert words in refusal([user("2+2?"), assistant("<think>easy</think>")], template)


def test_all_parts_of_a_content_that_is_written_in_another_way_are_looked_for():
    """As Qwen3 does it, which takes the first part and the last."""
    rewritten = LAST_PART.replace(
        "{{ m.content.split(MARK)[-1] }}",
        "{% set parts = m.content.split('</think>') %}{{ parts[0].split('<think>')[-1].strip('\n') }}"
        "</think>{{ parts[-1] }}",
    )
    notices = [
        encoded_rows([{"messages": [user("?"), assistant(content)]}], chat_tokenizer(rewritten)).report.notices
        for content in ("<think>\neasy\n</think>4.", "Use <think> and </think> tags.", "a</think>b</think>c")
    ]
    assert [notice.example for each in notices for notice in each] == ["'Use'", "'b'"]
    assert not notices[0]


def test_a_call_that_a_template_writes_but_does_not_mark_is_said():
    call_text = "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>"
    content = "{{ m.content }}{% for c in m.tool_calls or [] %}" + call_text + "{% endfor %}"
    chatml = CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% else %}ANSWER{% endif %}")
    marked = "{% generation %}BOTH{% endgeneration %}"
    around_content = content.replace("{{ m.content }}", marked.replace("BOTH", "{{ m.content }}"))
    rows = [
        {"messages": [user("?"), assistant("I add.", tool_calls=[call("mul", a=1), call("add", a=1)])]},
        {"messages": LONG},
    ]
    for answer, expected in ((around_content, ["call"]), (marked.replace("BOTH", content), []), (content, [])):
        tokenizer = chat_tokenizer(chatml.replace("ANSWER", answer))
        encoded = encoded_rows(rows, tokenizer)
        assert [notice.kind for notice in encoded.report.notices] == expected
        assert responses(encoded.dataset[0], tokenizer)[0].startswith("I add.<call>mul") != bool(expected)
    encoded = encoded_rows(rows, chat_tokenizer(chatml.replace("ANSWER", around_content)))
    ((notice, num_rows),) = encoded.report.notices.items()
    assert (num_rows, notice.is_warning) == (1, True)
    words = "in 1 row the chat template leaves a tool call out of what it marks with `{% generation %}`, such as that"
    assert f"{words} of `mul`" in notice.in_words("1 row")


def test_a_message_of_a_tool_or_the_system_that_a_template_leaves_out_is_said():
    messages = [SYSTEM, user("1+2?"), assistant("<add>"), {"role": "tool", "content": "It is three"}, assistant("3")]
    chatml = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role not in LEFT_OUT %}")
    for left_out, example in (("tool", "'It is three' (tool)"), ("system", "'Be brief.' (system)")):
        tokenizer = chat_tokenizer(chatml.replace("LEFT_OUT", repr([left_out])))
        rows = encoded_rows([{"messages": messages}, {"messages": LONG}], tokenizer)
        ((notice, num_rows),) = rows.report.notices.items()
        assert num_rows == 1
        words = f"in 1 row the chat template leaves out a message before a turn that is learnt: {example}. The"
        assert notice.in_words("1 row").startswith(words)
    upper = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else m.content | upper }}")
    assert not encoded_rows([{"messages": messages}], chat_tokenizer(upper)).report.notices


def test_of_reasoning_by_two_names_a_template_writes_one():
    template = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    turn = assistant("6!", reasoning_content="3 and 3")
    (row,) = encode([{"messages": [LONG[0], {**turn, "reasoning": "3 and 3"}]}], chat_tokenizer(template))
    assert responses(row, chat_tokenizer(template)) == ["3 and 36!<|im_end|>"]
    assert "has the `reasoning` 'twice 3'" in refusal([LONG[0], {**turn, "reasoning": "twice 3"}], template)
