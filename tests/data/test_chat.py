"""Conversations: what the chat template writes, and which of its tokens are the assistant's."""

import json
import re

import datasets
import lightning as L
import pytest
import torch
from support.models import character_tokenizer, tiny_config
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lightning_sft import GenerationMonitor, Sampling, SFTDataModule, SFTModule
from lightning_sft.data.chat_encoding import ChatEncoder, end_of_turn_id
from lightning_sft.data.chat_template import ChatTemplate, with_chat_template
from lightning_sft.data.conversation import read_conversation
from lightning_sft.data.encoded_rows import content_hash, encode_rows
from lightning_sft.data.encoding import Encoding
from lightning_sft.data.prompts import Prompt
from lightning_sft.data.row_format import RowFormat
from lightning_sft.data.sources import open_sources, own_keys
from lightning_sft.data.step_loader import StepDataset
from lightning_sft.data.stream import open_streams
from lightning_sft.data.tokenization import encode_prompts

# -- the public formats, in short --------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'You are Qwen.' }}"
    "{% for t in tools or [] %}{{ '\n' }}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}{{ '\n' + m.content if m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the system's words belong to the first question, and there is no generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ messages[0].content + '\n\n' if messages[0].role == 'system' and loop.index0 == 1 }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # a whole conversation is closed by EOS
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (  # only the turn after the last question keeps its reasoning
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = ns.asked + 1 %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and ns.asked == questions | length %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<|user|>", "<|assistant|>"]
FORMATS = {  # template, and what ends a turn
    "ChatML": (CHATML, "<|im_end|>"),
    "Qwen2.5": (QWEN, "<|im_end|>"),
    "Llama 3": (LLAMA3, "<|eot_id|>"),
    "Gemma": (GEMMA, "<end_of_turn>"),
    "Mistral": (MISTRAL, "<eos>"),
    "Phi": (PHI, "<|end|>"),
}


def chat_tokenizer(template: str | None = None, bos: bool = True):
    tokenizer = character_tokenizer(bos=bos)
    swallows_line_breaks = AddedToken("<|end|>", rstrip=True, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, swallows_line_breaks]})
    tokenizer.chat_template = template
    return tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
LONG = [user("2+2?"), assistant("4."), user("3+3?"), assistant("6!")]


def encode(rows, tokenizer, **options):
    names = [name for name in RowFormat.__dataclass_fields__ if name in options]
    row_format = RowFormat(**{name: options.pop(name) for name in names})
    return encode_rows(open_sources(rows, "train_data"), row_format, tokenizer, Encoding(**options)).dataset


def responses(row, tokenizer) -> list[str]:
    """The text of each stretch of tokens that is learnt."""
    bounds = [row["num_prompt_tokens"], *row["excluded_spans"], len(row["input_ids"])]
    texts = [
        tokenizer.decode(row["input_ids"][start:end]) for start, end in zip(bounds[::2], bounds[1::2], strict=True)
    ]
    return [text for text in texts if text]


def learnt(messages, template, **options):
    tokenizer = chat_tokenizer(template)
    (row,) = encode([{"messages": messages}], tokenizer, **options)
    return responses(row, tokenizer)


# -- which tokens are learnt -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", FORMATS)
def test_the_ids_are_those_of_the_template(name):
    tokenizer = chat_tokenizer(FORMATS[name][0])
    (row,) = encode([{"messages": LONG}], tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(LONG)["input_ids"]
    texts = responses(row, tokenizer)
    assert row["num_response_tokens"] == len(tokenizer("".join(texts), add_special_tokens=False)["input_ids"])


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


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOLS = [
    user("1+2?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": None},
    assistant("It is 3."),
]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'


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


def test_whole_conversations_named_as_prompts_are_told_their_place():
    words = "row 1 of .* all 4 messages are in `prompt_field`, .* Rename a column of whole conversations to `messages`"
    with pytest.raises(ValueError, match=words):
        encode([{"dialog": LONG}], chat_tokenizer(CHATML), prompt_field="dialog")


def test_messages_are_left_alone_where_columns_are_named():
    row = {"messages": LONG, "question": "a", "output": "b"}
    for named in ({"prompt_field": "question"}, {"prompt_template": "{question}"}):
        assert encode([row], chat_tokenizer(CHATML), **named)["prompt"] == ["a"]


def test_the_row_and_the_options_give_the_template_more_to_use():
    tokenizer = chat_tokenizer("{{ date }}:" + CHATML)
    rows = [{"messages": LONG}, {"messages": LONG, "chat_template_kwargs": {"date": "two"}}]
    prompts = encode(rows, tokenizer, chat_template_kwargs={"date": "one"})["prompt"]
    assert [prompt.partition(":")[0] for prompt in prompts] == ["one", "two"]


# -- bounds that are no bounds -----------------------------------------------------------------------------------------


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


def test_a_turn_that_begins_or_ends_within_a_token_is_refused():
    header, end = "{% if add_generation_prompt %}assistant:{% endif %}", "<|im_end|>{% endfor %}"
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + header)
    tokenizer.add_tokens([":6"])
    words = "turn 4 (assistant) begins within a token, between '<|im_end|>assistant:' and '6!<|im_end|>'."
    with pytest.raises(ValueError, match="row 1 of `train_data`: " + re.escape(words)):
        encode([{"messages": LONG}], tokenizer)


BAD_MESSAGES = {
    "no turn of the assistant": ([user("a")], "no turn of the assistant to learn from among 1 messages"),
    "an empty list": ([], "`messages` has no messages; expected at least one."),
    "no list": ("hello", "`messages` is 'hello', which is not JSON"),
    "no object": (["a"], "`messages`, turn 1 is 'a', expected an object with `role` and `content`."),
    "an unknown role": (
        [user("a"), {"role": "wizard", "content": "b"}],
        "turn 2 has the role 'wizard', expected one of",
    ),
    "no role": ([{"content": "b"}], "turn 1 has the role None"),
    "a number": ([user(3)], "turn 1 (user) has the content 3, expected a string."),
    "no content": ([user("a"), assistant(None)], "turn 2 (assistant) has the content None"),
    "an image": (
        [user([{"type": "image"}])],
        "turn 1 has the content part {'type': 'image'}, expected text parts only.",
    ),
    "arguments that are no JSON": (
        [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
        "`messages`, turn 2, arguments is '{', which is not JSON",
    ),
    "a share of a turn": (
        [user("a"), assistant("b", weight=0.5)],
        "`messages`, turn 2 (assistant) has the `weight` 0.5, expected 1, or 0 for a turn that is not to be learnt.",
    ),
    "no weight anywhere": (
        [user("a"), assistant("b", weight=0), assistant("c", weight=0)],
        "all 2 turns of the assistant have the `weight` 0. Remove the row.",
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


# -- tokens that reach over a bound, and real ones ---------------------------------------------------------------------


def test_the_real_qwen2_tokenizer(shared_data):
    tokenizer = with_chat_template(AutoTokenizer.from_pretrained(shared_data / "qwen2_tokenizer"), QWEN)
    messages = [user("Wie spät ist es?"), assistant("  Fünf — 五点.\n"), *WITH_TOOLS]
    encoder, conversation = ChatEncoder(tokenizer), read_conversation({"m": messages, "tools": [TOOL]}, ["m"])
    (row,) = encoder.encode([encoder.write(conversation)])
    assert row.input_ids == tokenizer.apply_chat_template(messages, tools=[TOOL])["input_ids"]
    assert responses(vars(row), tokenizer) == ["  Fünf — 五点.\n<|im_end|>", CALLED, "It is 3.<|im_end|>"]
    assert tokenizer.decode(end_of_turn_id(tokenizer)) == "<|im_end|>"


def test_a_tokenizer_that_marks_the_start_of_a_text_is_asked_for_the_text_up_to_each_bound(shared_data):
    """Its pieces have other tokens than the whole."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260k")
    template = with_chat_template(tokenizer, MISTRAL.replace(" {{ m.content }}{{ eos", "{{ m.content }}{{ eos"))
    (row,) = encode([{"messages": LONG}], template)
    assert row["input_ids"] == template.apply_chat_template(LONG)["input_ids"]
    bounds = [row["num_prompt_tokens"], *row["excluded_spans"]]
    (before,) = encode([{"messages": LONG[:2]}], template)
    assert bounds[1] == before["num_tokens"]
    assert responses(row, template) == ["4.</s>", "6!</s>"]


# -- from rows to batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 30])
def test_padded_and_packed_batches_mark_the_same_tokens_and_the_plan_knows_how_many(max_length):
    tokenizer = chat_tokenizer(CHATML)
    rows = [{"messages": LONG}, {"prompt": "a", "output": "b"}, {"messages": LONG[:2]}]
    marked = {}
    for layout in ("padded", "packed"):
        data = SFTDataModule(tokenizer, rows, max_length=max_length, too_long="truncate", batch_size=3)
        data.setup("fit")
        (step,) = [StepDataset(data._rows["train"], data._plans["train"], 0, 0, layout)[0]]
        (batch,) = step.microbatches
        assert step.totals.num_response_tokens == batch.response_mask.sum() == len(batch.response_positions)
        marked[layout] = tokenizer.decode(batch.labels[batch.response_mask])
    expected = "4.<|im_end|>6!<|im_end|>" if max_length is None else "4.<|im_end|>"
    assert marked["padded"] == marked["packed"]
    assert sorted(marked["padded"]) == sorted(expected + "b<eos>" + "4.<|im_end|>")


def test_the_prompt_to_generate_from_is_the_conversation_up_to_the_last_turn():
    tokenizer = chat_tokenizer()
    data = SFTDataModule(
        tokenizer,
        [{"messages": LONG}, {"messages": LONG, "ground_truth": "six"}],
        predict_data=[{"messages": LONG[:3]}, {"messages": LONG}, {"prompt": LONG[:1]}, {"prompt": "plain"}],
        chat_template=LLAMA3,
    )
    data.setup("fit")
    data.setup("predict")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    first = "<bos>" + header.format("user") + "2+2?<|eot_id|>" + header.format("assistant")
    whole = first + "4.<|eot_id|>" + header.format("user") + "3+3?<|eot_id|>" + header.format("assistant")
    assert [(prompt.text, prompt.ground_truth) for prompt in data.prompts("fit")] == [(whole, "6!"), (whole, "six")]
    assert data._rows["train"]["output"] == ["6!", "6!"]
    assert data.prompts("predict") == [
        Prompt(0, whole, None, is_chat=True),
        Prompt(1, whole, "6!", is_chat=True),
        Prompt(2, first, None, is_chat=True),
        Prompt(3, "plain", None, is_chat=False),
    ]
    assert tokenizer.chat_template is None  # the given one is left alone


def test_a_bad_conversation_to_predict_from_is_located():
    data = SFTDataModule(chat_tokenizer(CHATML), predict_data=[{"messages": [assistant("a")]}])
    with pytest.raises(ValueError, match=r"row 1 of `predict_data`: turn 1 \(assistant\) has nothing before it"):
        data.setup("predict")


def test_a_prompt_of_the_template_gets_no_bos_that_the_training_rows_do_not_have():
    tokenizer = chat_tokenizer(CHATML, bos=True)
    (row,) = encode([{"messages": LONG}], tokenizer)
    prompts = encode_prompts([row["prompt"], row["prompt"]], tokenizer, as_written=[True, False])
    assert prompts[0] == row["input_ids"][: row["excluded_spans"][1]]
    assert prompts[1] == [tokenizer.bos_token_id, *prompts[0]]

    tokenizer = chat_tokenizer(LLAMA3, bos=True)
    (row,) = encode([{"messages": LONG}], tokenizer)
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert encode_prompts([row["prompt"]], tokenizer) == [row["input_ids"][: row["excluded_spans"][1]]]


def test_rows_are_tokenised_again_when_the_template_changes_and_only_then(monkeypatch):
    applied = []
    write = ChatTemplate.write
    monkeypatch.setattr(ChatTemplate, "write", lambda self, *args, **kw: applied.append(1) or write(self, *args, **kw))

    def renders(template=CHATML, tools=None, **options):
        applied.clear()
        encode([{"messages": LONG[:2], "tools": tools}], chat_tokenizer(template), **options)
        return bool(applied)

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE / "of this test")
    assert [renders(), renders()] == [True, False]
    assert renders("{{ ' ' }}" + CHATML)
    assert renders(train_on_turns="last")
    assert renders(chat_template_kwargs={"a": 1})
    assert renders(tools=[TOOL])
    assert not renders()


def test_the_hash_of_the_data_changes_with_the_turns_that_are_learnt():
    rows = [{"prompt": LONG[:1], "output": LONG[1:]}]
    tokenizer = chat_tokenizer(CHATML)
    both = encode(rows, tokenizer)
    first = both.map(lambda row: {"excluded_spans": [row["excluded_spans"][0], len(row["input_ids"])]})
    assert content_hash(both) != content_hash(first)


@pytest.mark.parametrize("argument", [{"chat_template": "no.jinja"}, {"train_on_turns": "first"}])
def test_a_bad_argument_is_refused_before_anything_is_read(argument):
    ((name, value),) = argument.items()
    with pytest.raises((ValueError, FileNotFoundError), match=f"`{name}` is '{value}'"):
        SFTDataModule("nowhere", [], **argument)


def test_a_template_may_be_in_a_file(tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    data = SFTDataModule(chat_tokenizer(), [], chat_template=str(tmp_path / "chat.jinja"))
    assert data.tokenizer.chat_template == CHATML


# -- to the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, LLAMA3])
def test_the_token_that_ends_a_turn_is_known_for_generation(template):
    tokenizer = chat_tokenizer(template)
    expected = tokenizer.convert_tokens_to_ids("<|eot_id|>") if template else None
    assert end_of_turn_id(tokenizer) == expected


def test_a_model_learns_two_conversations_and_stops_where_the_turn_ends(tmp_path, monkeypatch):
    prompted = []
    monkeypatch.setattr(
        "lightning_sft.generation.batches.encode_prompts",
        lambda *args, **options: prompted.extend(ids := encode_prompts(*args, **options)) or ids,
    )
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(CHATML, bos=True)
    rows = [
        {"messages": [user("a"), assistant("xy"), user("b"), assistant("zzz")]},
        {"messages": [user("c"), assistant("w"), user("b"), assistant("no")]},
    ]
    module = SFTModule(
        tiny_config(vocab_size=len(tokenizer), hidden_size=32),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        lr_scheduler="constant",
        warmup_steps=0,
    )
    monitor = GenerationMonitor(sampling=Sampling(max_new_tokens=6), num_rows_shown=2)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=60, callbacks=[monitor], **quiet)
    data = SFTDataModule(tokenizer, rows, predict_data=[{"messages": rows[0]["messages"][:1]}, *rows])
    trainer.fit(module, data)
    ((first, *last),) = trainer.predict(module, data)
    assert (first.response, first.stop_reason) == ("xy", "eos")  # the first turn was learnt, too
    assert [(record.response, record.stop_reason) for record in last] == [("zzz", "eos"), ("no", "eos")]
    assert [record.ground_truth for record in (first, *last)] == [None, "zzz", "no"]
    assert last[0].tokens == ["z", "z", "z", "<|im_end|>"]
    assert prompted[-3:] == [
        tokenizer(record.prompt, add_special_tokens=False)["input_ids"] for record in (first, *last)
    ]
