"""Conversations of many turns, in a time that grows with their length."""

from support.chat import (
    CHATML,
    MARKED,
    THINKING,
    THOUGHT,
    assistant,
    chat_tokenizer,
    encode,
    examples,
    prompt,
    responses,
    user,
)

from lightning_sft.data.chat import chat_template
from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.chat.conversation import Conversation

# The prompt opens the reasoning, which of earlier turns is not written.
OPENED_THINKING = THINKING.replace("assistant\n{% endif", "assistant\n<think>{% endif")


def test_rows_of_many_turns_are_written_as_those_of_few():
    messages = [message for _ in range(40) for message in THOUGHT]
    for template in (THINKING, OPENED_THINKING):
        expected = []
        for index in range(1, len(messages), 2):
            context = prompt(messages[:index], template)
            turn = f"<think>{messages[index]['reasoning_content']}</think>{messages[index]['content']}<|im_end|>"
            expected.append((context, turn.removeprefix("<think>") if template == OPENED_THINKING else turn))
        assert examples(messages, template) == expected
    tokenizer = chat_tokenizer(CHATML)
    messages = [{"role": message["role"], "content": message["content"]} for message in [*messages, user("?")]]
    (row,) = encode([{"messages": messages}], tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
    assert responses(row, tokenizer) == [f"{turn['content']}<|im_end|>" for turn in messages[1::2]]


def test_a_template_that_changes_its_mind_in_the_middle_of_a_long_conversation_is_found_out():
    odd = CHATML.replace(
        "{{ m.content }}", "{{ 'late ' if loop.index0 == 1 and messages | length > 60 }}{{ m.content }}"
    )
    messages = [user("2+2?"), assistant("4.")] * 40
    contexts = [prompt(messages[:index], odd) for index in range(1, len(messages), 2)]
    assert [context for context, _ in examples(messages, odd)] == contexts
    assert "late" not in contexts[20]
    assert "late" in contexts[-1]


def test_the_number_of_renderings_grows_with_the_number_of_turns(monkeypatch):
    written, write = [], chat_template.render_jinja_template
    monkeypatch.setattr(
        chat_template,
        "render_jinja_template",
        lambda chats, **options: written.append(len(chats[0])) or write(chats, **options),
    )
    plain, thought = [user("2+2?"), assistant("4.")], THOUGHT[:2]
    for template, exchange in ((CHATML, plain), (MARKED, plain), (THINKING, thought), (OPENED_THINKING, thought)):
        totals = []
        for num_turns in (50, 100, 200):
            written.clear()
            ChatEncoder(chat_tokenizer(template)).write(Conversation(exchange * num_turns))
            totals.append(sum(written))
        assert totals[2] < 2.2 * totals[1] < 5 * totals[0]
