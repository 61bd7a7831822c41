"""Which turns are learnt, and where they begin and end in what a chat template writes."""

import re

import pytest
from support.chat import (
    CHATML,
    FORMATS,
    GEMMA,
    LONG,
    SYSTEM,
    THINKING,
    assistant,
    chat_tokenizer,
    encode,
    learnt,
    responses,
    user,
)


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
        "row 1 of `train_data`: turn 4 (assistant), the last one, has the `weight` 0, but `train_on_turns` is "
        '"last". Remove the turn, or set `train_on_turns` to "all".'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        learnt([LONG[0], good, LONG[2], bad], CHATML, train_on_turns="last")


def test_whole_conversations_named_as_prompts_are_told_which_column_is_theirs():
    words = "row 1 of .* all 4 messages are in `prompt_field`, .* Rename a column of whole conversations to `messages`"
    with pytest.raises(ValueError, match=words):
        encode([{"dialog": LONG}], chat_tokenizer(CHATML), prompt_field="dialog")


def refusal(messages, template):
    with pytest.raises(ValueError, match="row 1 of") as caught:
        encode([{"messages": messages}], chat_tokenizer(template))
    return str(caught.value)


def test_a_template_that_drops_earlier_reasoning_is_refused_unless_only_the_last_turn_is_learnt():
    thinking = [
        user("2+2?"),
        assistant("4.", reasoning_content="easy"),
        user("3+3?"),
        assistant("6!", reasoning_content="harder"),
    ]
    assert learnt(thinking[:2], THINKING) == ["<think>easy</think>4.<|im_end|>"]
    assert refusal(thinking, THINKING) == (
        "row 1 of `train_data`: turn 2 (assistant): the chat template writes "
        "'im_start|>assistant\\n<think>easy</think>4', but when others follow "
        "'im_start|>assistant\\n4.<|im_end|>\\n<|im_st'. "
        'Give another `chat_template`, or set `train_on_turns` to "last".'
    )
    assert learnt(thinking, THINKING, train_on_turns="last") == ["<think>harder</think>6!<|im_end|>"]


REFUSED = {
    "a prompt that is written otherwise": (
        "{{ messages | length }}" + CHATML,
        "turn 2 (assistant): to prompt for it the chat template writes '1<|im_start|>user\\n2+', but in the whole "
        "conversation '4<|im_start|>user\\n2+': what it writes depends on later turns. "
        'Give another `chat_template`, or set `train_on_turns` to "last".',
    ),
    "no end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "turn 2 (assistant): it ends in '4.\\n', in no special token",
    ),
    "no end, though a special token within": (
        "{% for m in messages %}{{ m.role }}:<|user|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "turn 2 (assistant): it ends in '<|user|>4.\\n', in no special token",
    ),
    "an end that only later turns bring": (
        "{% for m in messages %}{{ '<eos>' if m.role == 'user' and loop.index0 }}{{ m.content }}{% endfor %}",
        "turn 2 (assistant): it ends in '4.', in no special token",
    ),
    "another end where others follow": (
        CHATML.replace("<|im_end|>", "{{ '<|end|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}"),
        "turn 2 (assistant): the chat template writes '_start|>assistant\\n4.<|end|>\\n', but when others follow "
        "'_start|>assistant\\n4.<|im_end|>\\n<|im_star'.",
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
        "the row has messages, but the tokenizer has no chat template. Pass `chat_template`, a text or a file",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proved_is_refused(name):
    template, words = REFUSED[name]
    messages = [SYSTEM, *LONG] if template == GEMMA else LONG
    assert words in refusal(messages, template)
