"""Which turns are learnt, and where they begin and end in what a chat template writes."""

import re

import pytest
from support.chat import (
    CHATML,
    FORMATS,
    GEMMA,
    LONG,
    MARKED,
    MISTRAL,
    SYSTEM,
    THINKING,
    THOUGHT,
    assistant,
    chat_tokenizer,
    encode,
    examples,
    learnt,
    prompt,
    responses,
    user,
)
from support.rows import encode as encoded_rows

from lightning_sft import SFTDataModule
from lightning_sft.data.chat.chat_encoding import end_of_turn_id


@pytest.mark.parametrize("name", FORMATS)
def test_the_response_is_each_turn_of_the_assistant_up_to_the_token_that_ends_it(name):
    template, end = FORMATS[name]
    space = " " * (name == "Mistral")
    assert learnt(LONG[:2], template) == [f"{space}4.{end}"]
    assert learnt(LONG, template) == [f"{space}4.{end}", f"{space}6!{end}"]
    assert learnt(LONG, template, train_on_turns="last") == [f"{space}6!{end}"]
    assert learnt([*LONG, user("?")], template) == [f"{space}4.{end}", f"{space}6!{end}"]
    if name != "Gemma":  # which has no system turn
        assert learnt([SYSTEM, *LONG], template) == [f"{space}4.{end}", f"{space}6!{end}"]


def test_ids_and_bounds_of_two_turns_spelled_by_hand():
    tokenizer = chat_tokenizer(CHATML)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    (row,) = encode([{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}], tokenizer)
    question, answer = [start, *b"user\n"], [start, *b"assistant\n"]
    first = [*question, *b"a", end, *b"\n", *answer, *b"b", end]
    second = [*b"\n", *question, *b"c", end, *b"\n", *answer, *b"d", end]
    assert row["input_ids"] == [*first, *second, *b"\n"]
    assert row["num_prompt_tokens"] == len(first) - 2
    assert row["excluded_spans"] == [len(first), len(first + second) - 2, len(first + second), len(first + second) + 1]
    assert (row["num_tokens"], row["num_response_tokens"]) == (len(first + second) + 1, 4)


def test_a_turn_of_weight_0_is_not_learnt():
    tokenizer = chat_tokenizer(CHATML)
    bad, good = assistant("4.", weight=0), assistant("6!", weight=1)
    first, last = encode(
        [{"messages": [LONG[0], bad, LONG[2], good]}, {"messages": [LONG[0], good, LONG[2], bad]}], tokenizer
    )
    assert responses(first, tokenizer) == responses(last, tokenizer) == ["6!<|im_end|>"]
    assert first["input_ids"] == tokenizer.apply_chat_template(LONG)["input_ids"]
    assert last["output"] == last["ground_truth"] == "6!"
    assert learnt([LONG[0], bad, LONG[2], good], CHATML, train_on_turns="last") == ["6!<|im_end|>"]
    words = (
        "row 1 of `train_data`: turn 4 (assistant), the last one, has the `weight` 0 (or `train` false, or "
        'similar), but `train_on_turns` is "last". Remove the turn, or set `train_on_turns` to "all".'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        learnt([LONG[0], good, LONG[2], bad], CHATML, train_on_turns="last")


def test_whole_conversations_named_as_prompts_are_told_which_column_is_theirs():
    words = "row 1 of .* all 4 messages are in `prompt_field`, .* Rename a column of whole conversations to `messages`"
    with pytest.raises(ValueError, match=words):
        encode([{"dialog": LONG}], chat_tokenizer(CHATML), prompt_field="dialog")


def refusal(messages, template, **row):
    with pytest.raises(ValueError, match="row 1 of") as caught:
        encode([{"messages": messages, **row}], chat_tokenizer(template))
    return str(caught.value)


def test_where_earlier_reasoning_is_dropped_each_turn_is_an_example_of_its_own():
    first = (prompt(THOUGHT[:1], THINKING), "<think>easy</think>4.<|im_end|>")
    last = (prompt(THOUGHT[:3], THINKING), "<think>harder</think>6!<|im_end|>")
    assert examples(THOUGHT, THINKING) == [first, last]
    assert "easy" not in last[0]
    assert examples(THOUGHT[:2], THINKING) == [first]
    assert examples(THOUGHT, THINKING, train_on_turns="last") == [last]


def test_examples_of_one_row_say_which_turn_they_are_and_a_ground_truth_is_that_of_the_last():
    rows = encode([{"messages": THOUGHT, "ground_truth": "six"}], chat_tokenizer(THINKING))
    assert rows["location"][:] == ["row 1, turn 2", "row 1, turn 4"]
    assert rows["output"][:] == ["<think>easy</think>4.", "<think>harder</think>6!"]
    assert rows["ground_truth"][:] == ["4.", "six"]


def test_a_prompt_that_changes_with_the_number_of_turns_stands_before_each_turn_as_it_is_then():
    template = "{{ messages | length }}" + CHATML
    expected = [(prompt(LONG[:number], template), f"{LONG[number]['content']}<|im_end|>") for number in (1, 3)]
    assert examples(LONG, template) == expected
    assert [context[0] for context, _ in expected] == ["1", "3"]


def test_the_end_of_a_conversation_is_learnt_for_each_turn_if_it_differs_from_that_of_a_turn_within():
    template = CHATML.replace("<|im_end|>", "{{ '<|end|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}")
    assert examples(LONG, template) == [
        (prompt(LONG[:1], template), "4.<|end|>"),
        (prompt(LONG[:3], template), "6!<|end|>"),
    ]


OPEN = {  # a turn ends in no special token
    "a line break": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "after a special token": "{% for m in messages %}{{ m.role }}:<|user|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:<|user|>{% endif %}",
    "the marker of the next turn": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


@pytest.mark.parametrize("name", OPEN)
def test_a_turn_that_ends_in_no_special_token_is_an_example_of_its_own_that_ends_in_eos(name):
    template = OPEN[name]
    expected = [(prompt(LONG[:1], template), "4.<eos>"), (prompt(LONG[:3], template), "6!<eos>")]
    assert examples(LONG, template) == expected
    without = [(context, turn.removesuffix("<eos>")) for context, turn in expected]
    assert examples(LONG, template, append_eos=False) == without


@pytest.mark.parametrize(("content", "expected"), [("4.\n", "4.\n<eos>"), ("4. ", "4. <eos>"), (" \n", " \n<eos>")])
def test_of_the_space_after_a_turn_its_own_is_learnt_and_not_that_of_the_template(content, expected):
    assert examples([user("2+2?"), assistant(content)], OPEN["a line break"])[0][1] == expected


def test_a_turn_without_an_end_is_refused_if_the_tokenizer_has_no_eos():
    tokenizer = chat_tokenizer(OPEN["a line break"])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"row 1 of .* without a special token, and the tokenizer has no EOS"):
        encode([{"messages": LONG}], tokenizer)


OPENED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


def test_where_the_prompt_holds_more_than_is_written_the_response_begins_where_they_part():
    rows = [{"messages": LONG}, {"prompt": "a", "output": "b"}, {"messages": LONG[:2]}]
    data = SFTDataModule(chat_tokenizer(OPENED), rows, batch_size=1)
    with pytest.warns(
        UserWarning, match="train_data: in 2 of 3 rows the chat template's generation prompt .*"
    ) as caught:
        data.setup("fit")
    (words,) = [str(warning.message) for warning in caught]
    assert r"It prompts with 'im_start|>assistant\n<think>\n', but before this turn 'im_start|>assistant\n4." in words
    assert "`reasoning_content`" in words
    assert "`chat_template_kwargs`" in words
    first, _, last = data.training_rows.rows.to_list()
    tokenizer = chat_tokenizer(OPENED)
    assert responses(first, tokenizer) == ["4.<|im_end|>", "6!<|im_end|>"]
    assert tokenizer.decode(first["input_ids"][: first["num_prompt_tokens"]]).endswith("<|im_start|>assistant\n")
    assert first["prompt"] == prompt(LONG[:3], OPENED)
    assert responses(last, tokenizer) == ["4.<|im_end|>"]


@pytest.mark.parametrize("question", ["", " \n", "k", "think", "<think>", "assistant", "."])
def test_a_prompt_that_parts_is_found_whatever_the_message_before_says(question):
    (row,) = encode([{"messages": [*LONG[:2], user(question), assistant("6!")]}], chat_tokenizer(OPENED))
    assert responses(row, chat_tokenizer(OPENED)) == ["4.<|im_end|>", "6!<|im_end|>"]
    assert row["prompt"].endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n<think>\n")


LAST_QUESTION = MISTRAL.replace("loop.index0 == 1", "loop.last").replace(  # Mistral 7B v0.3 and Nemo
    " {{ m.content }}{{ eos_token }}",
    "{% for c in m.tool_calls or [] %}{{ raise_exception('9 characters') if c.id | length != 9 }}[CALL]"
    "{{ c.id + c.function.name }}{{ c.function.arguments | tojson }}{% endfor %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.tool_call_id }}{{ m.content }}[/RESULT]",
)


def test_where_only_the_last_question_shows_the_system_and_nothing_prompts_each_turn_is_learnt_after_it():
    tokenizer = chat_tokenizer(LAST_QUESTION)
    call = {"id": "abc123456", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    result = {"role": "tool", "tool_call_id": "abc123456", "content": "7"}
    messages = [SYSTEM, *LONG, user("c"), assistant("", tool_calls=[call]), result, assistant("7")]
    rows = encode([{"messages": messages}], tokenizer)
    assert [responses(row, tokenizer) for row in rows] == [
        [" 4.<eos>"],
        [" 6!<eos>"],
        ['[CALL]abc123456f{"a": 1} <eos>'],
        [" 7<eos>"],
    ]
    for row, length in zip(rows, (2, 4, 6, 8), strict=True):
        asked = tokenizer.apply_chat_template(messages[:length], add_generation_prompt=True)["input_ids"]
        assert row["input_ids"][: row["num_prompt_tokens"]] == asked


def test_an_empty_turn_begins_with_the_token_that_ends_it_where_the_prompt_begins_with_the_same_characters():
    tokenizer = chat_tokenizer(CHATML.replace("assistant\n{% endif", "assistant\n<|think>{% endif"))
    rows = encoded_rows([{"messages": [*LONG[:3], assistant("")]}], tokenizer)
    assert responses(rows.dataset[0], tokenizer) == ["4.<|im_end|>", "<|im_end|>"]
    assert [notice.kind for notice in rows.report.notices] == ["prompt", "empty"]


@pytest.mark.parametrize("question", ["3+3?", ""])
def test_where_prompt_and_turn_share_a_token_the_response_begins_with_it(question):
    messages = [*LONG[:2], user(question), LONG[3]]
    header = "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}" + header)
    tokenizer.add_tokens([":6"])
    (row,) = encode([{"messages": messages}], tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert responses(row, tokenizer) == ["4.<|im_end|>", ":6!<|im_end|>"]
    ((notice, num_rows),) = encoded_rows([{"messages": messages}], tokenizer).report.notices.items()
    assert num_rows == 1
    words = "in {rows} one token holds the end of the generation prompt and the beginning of the turn: "
    assert notice.in_words("{rows}").startswith(
        f"{words}'<|im_end|>assistant:6!<|im_end|>'. The response begins with it"
    )


def test_a_turn_that_is_marked_without_the_token_that_ends_it_is_learnt_with_it_even_if_it_is_empty():
    assert learnt([*LONG[:3], assistant("")], MARKED) == ["4.<|im_end|>", "<|im_end|>"]


def test_a_conversation_that_the_assistant_begins_is_learnt_from_the_second_answer_on():
    greeting = [assistant("Hello."), *LONG]
    assert learnt(greeting, CHATML) == learnt([SYSTEM, *greeting], CHATML) == ["4.<|im_end|>", "6!<|im_end|>"]
    assert learnt([SYSTEM, assistant("Hello.")], CHATML) == ["Hello.<|im_end|>"]
    assert "turn 1 (assistant) has nothing before it" in refusal([assistant("Hello.")], CHATML)


PROMPTS_ALWAYS = CHATML.replace("add_generation_prompt", "true")
PROMPTS_ALWAYS_BUT_FOR_THE_LAST_TOKEN = (
    PROMPTS_ALWAYS.replace("{{ m.content", "{{ '<|end|>' if m.role == 'assistant' }}{{ m.content")
    + "{{ '<|end|>' if add_generation_prompt }}"
)


@pytest.mark.parametrize("template", [PROMPTS_ALWAYS, PROMPTS_ALWAYS_BUT_FOR_THE_LAST_TOKEN])
def test_where_a_template_prompts_after_an_answer_too_the_turn_ends_in_eos(template):
    tokenizer = chat_tokenizer(template)
    tokenizer.eos_token = "<|im_end|>"
    (row,) = encode([{"messages": LONG}], tokenizer)
    assert responses(row, tokenizer) == ["4.<|im_end|>", "6!<|im_end|>"]
    assert row["input_ids"] == tokenizer.apply_chat_template(LONG)["input_ids"]
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


def test_of_an_earlier_answer_with_which_a_turn_is_written_together_nothing_is_learnt():
    template = (  # as Gemma 4: messages of one role are one, and a tool's result without a call is left out
        "{% set ns = namespace(last='') %}{% for m in messages if m.role != 'tool' %}{% if m.role != ns.last %}"
        "{{ '<|im_end|>\n' if ns.last }}<|im_start|>{{ m.role }}\n{% endif %}{{ m.content }}{% set ns.last = m.role %}"
        "{% endfor %}<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [LONG[0], assistant("4.", weight=0), {"role": "tool", "content": "8"}, assistant("6!")]
    assert "turn 4 (assistant): the chat template prompts for it with" in refusal(messages, template)


def test_a_token_that_ends_a_question_and_begins_the_turn_is_refused():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ '\n' if m.role == 'assistant' }}{{ m.content }}"
        "{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}"
    )
    tokenizer.add_tokens(["?\n"])
    words = r"turn 2 \(assistant\) begins within a token that ends the message before it, in '2\+2\?\\n4.<"
    with pytest.raises(ValueError, match=words):
        encode([{"messages": LONG}], tokenizer)


REFUSED = {
    "a prompt after an answer, too, and no EOS": (
        PROMPTS_ALWAYS,
        "turn 2 (assistant): the chat template always writes its generation prompt, also after the turn, and no EOS "
        "('<eos>') before that, so that the turn's end cannot be told: ",
    ),
    "an error of its own": (
        GEMMA,
        "row 1 of `train_data`: the chat template refuses the first 5 messages: TemplateError: roles must alternate",
    ),
    "an error of Python": (
        "{{ messages[0].none.at_all }}",
        "the chat template refuses the first 4 messages: Undefined",
    ),
    "no template": (
        None,
        "the row has messages (or `as_chat` makes them), but the tokenizer has no chat template. Pass `chat_template`",
    ),
    "a turn that is not after its prompt": (
        "{% if add_generation_prompt %}{% for m in messages %}{{ m.content }}{% endfor %}<|user|>"
        "{% else %}{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% endif %}",
        "turn 2 (assistant): the chat template prompts for it with '<|user|>', but the text before the turn is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(name):
    template, words = REFUSED[name]
    messages = [SYSTEM, *LONG] if template == GEMMA else LONG
    assert words in refusal(messages, template)
