"""Every public chat template of `trl`: what is learnt of rows of every shape, and in which context."""

import json
from dataclasses import dataclass
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from support.chat import assistant, responses, user
from support.rows import write
from support.templates import CALL_ENDS, ENDS, NAMES, SHAPES, TOOLS, end_of, template_tokenizer
from transformers import PreTrainedTokenizerBase

from lightning_sft import SFTDataModule
from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.chat.conversation import read_conversation
from lightning_sft.data.steps.step_loader import LoaderOptions
from lightning_sft.errors import SettingsError

pytestmark = pytest.mark.filterwarnings("ignore:.*(generation prompt holds more|leaves out a part of the content)")

PARTED = {  # shapes whose generation prompt holds more than is written before a turn
    "deepseek": "<think>, which is opened for the model and never written",
    "nemotron": "<think>\\n, where an empty reasoning is written as <think></think>",
    "qwen3_5_nothink": "an empty reasoning, where a turn has one",
}

MARKED_BEYOND_THE_END = ("phi3_training", "phi3_5_training")  # the EOS that closes a whole conversation is marked, too


@dataclass
class Learnt:
    """An example: what stands before it, what of it is learnt, and which of the messages that is."""

    context: str
    texts: list[str]
    turns: list[int]
    input_ids: list[int]
    mask: list[bool]


def row_of(shape: str) -> dict:
    return {"messages": SHAPES[shape], "tools": TOOLS if shape.startswith("tools") else None}


def learn(tokenizer: PreTrainedTokenizerBase, row: dict, mode: str = "all") -> list[Learnt]:
    encoder = ChatEncoder(tokenizer, mode)
    written = encoder.write(read_conversation(row, ["messages"]))
    found = []
    for each, encoded in zip(written, encoder.encode(written), strict=True):
        example = encoded.example
        bounds = [example.num_prompt_tokens, *example.excluded_spans, len(example.input_ids)]
        mask = [False] * len(example.input_ids)
        for start, end in zip(bounds[::2], bounds[1::2], strict=True):
            mask[start:end] = [True] * (end - start)
        context = tokenizer.decode(example.input_ids[: bounds[0]])
        turns = [turn.index for turn in each.turns]
        found.append(Learnt(context, responses(vars(example), tokenizer), turns, list(example.input_ids), mask))
    return found


def written(tokenizer: PreTrainedTokenizerBase, row: dict, length: int, prompt: bool = False) -> str | None:
    """What the template itself writes of the first messages; None if it refuses them."""
    for parts in (False, True):
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}] if parts else message["content"]}
            for message in row["messages"][:length]
        ]
        for as_text in (False, True):
            if as_text:
                calls = json.loads(json.dumps([message.get("tool_calls") or [] for message in messages]))
                for message, own in zip(messages, calls, strict=True):
                    for call in own:
                        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
                    message |= {"tool_calls": own} if own else {}
            try:
                text = tokenizer.apply_chat_template(
                    messages, tools=row.get("tools"), tokenize=False, add_generation_prompt=prompt
                )
            except (TemplateError, TypeError):
                continue
            if "Question" in text:
                return text
    return None


def what_is_lost(tokenizer: PreTrainedTokenizerBase, row: dict) -> str | None:
    """The field that the template does not write, as this test reads it: by looking for its words."""
    if written(tokenizer, row, len(row["messages"])) is None:
        return "the chat template refuses"
    for index, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        text = written(tokenizer, row, index + 1)
        if message.get("reasoning_content", "") not in text:
            return "`reasoning_content`"
        if message.get("tool_calls") and "Paris-town" not in text:
            return "`tool_calls`"
    return "`tools`" if row["tools"] and "The weather of a city." not in text else None


@pytest.mark.parametrize("name", NAMES)
def test_each_turn_is_learnt_in_the_context_of_inference_or_refused_for_what_is_lost(name):
    tokenizer = template_tokenizer(name)
    for shape in SHAPES:
        row = row_of(shape)
        lost = what_is_lost(tokenizer, row)
        if lost is not None:
            with pytest.raises(SettingsError) as caught:
                learn(tokenizer, row)
            assert lost in str(caught.value), (shape, str(caught.value))
            continue
        turns = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        examples = learn(tokenizer, row)
        assert [turn for example in examples for turn in example.turns] == turns
        assert len(examples) in (1, len(turns))
        for example in examples:
            assert len(example.texts) == len(example.turns)
            for text, index in zip(example.texts, example.turns, strict=True):
                check_response(name, tokenizer, row, text, index)
            check_context(name, tokenizer, row, example)
        (last,) = learn(tokenizer, row, "last")
        assert (last.turns, last.texts) == (turns[-1:], examples[-1].texts[-1:])
        check_context(name, tokenizer, row, last)


def check_response(name: str, tokenizer: PreTrainedTokenizerBase, row: dict, text: str, index: int) -> None:
    """The turn's own words, as far as the template writes them, its end, and nobody else's words."""
    message, whole = row["messages"][index], written(tokenizer, row, index + 1)
    reasoning, _, answer = message["content"].rpartition("</think>")
    reasoning = reasoning.removeprefix("<think>").strip() or message.get("reasoning_content", "")
    assert answer.strip() in text
    assert (reasoning in text) == (reasoning in whole)
    end = (end_of(name, CALL_ENDS) if message.get("tool_calls") else None) or end_of(name, ENDS)
    text = text.rstrip("\n")
    if name in MARKED_BEYOND_THE_END:
        text = text.removesuffix("<eos>").rstrip("\n")
    assert text.endswith(end)
    own = text.removesuffix(end)
    assert own in whole
    others = {"Question", "System", "Result", "The weather"}
    others |= {each["content"][-11:] for each in row["messages"] if each["content"] and each is not message}
    assert not [words for words in others if words in own]
    if message.get("tool_calls"):
        assert "get_weather" in own
        assert "Paris-town" in own


def check_context(name: str, tokenizer: PreTrainedTokenizerBase, row: dict, example: Learnt) -> None:
    """What stands before an example's first turn is the generation prompt, or what both share."""
    prompt = written(tokenizer, row, example.turns[0], prompt=True)
    if example.context == prompt:
        return
    longer, shorter = sorted((prompt, example.context), key=len, reverse=True)
    assert longer.startswith(shorter)
    rest = longer.removeprefix(shorter)
    assert not [words for words in ("Question", "Answer", "Reason", "System", "Result") if words in rest]
    if not is_marked(tokenizer):
        assert longer == prompt
        assert name.startswith(tuple(PARTED))
        assert not written(tokenizer, row, example.turns[0] + 1).startswith(prompt)


def is_marked(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "generation" in tokenizer.chat_template and "endgeneration" in tokenizer.chat_template


NOT_MARKED = {"diffusion_gemma_training": "<|tool_response>"}  # it ends a call, so it is learnt with what is marked


@pytest.mark.parametrize("name", [name for name in NAMES if is_marked(template_tokenizer(name))])
def test_what_a_template_marks_is_learnt_as_transformers_masks_it(name):
    tokenizer, more = template_tokenizer(name), NOT_MARKED.get(name, "")
    for shape in SHAPES:
        row = row_of(shape)
        if what_is_lost(tokenizer, row) is not None:
            continue
        examples = learn(tokenizer, row)
        for example in examples:
            length = len(row["messages"]) if len(examples) == 1 else example.turns[-1] + 1
            ids, mask = masked_by_transformers(tokenizer, row, length)
            masked = tokenizer.decode([token for token, is_masked in zip(ids, mask, strict=True) if is_masked])
            if len(examples) > 1:  # the last turn alone
                assert masked.endswith("".join(example.texts).removesuffix(more))
                continue
            assert example.input_ids == ids
            assert not [1 for ours, theirs in zip(example.mask, mask, strict=True) if theirs and not ours]
            assert "".join(example.texts).replace(more, "") == masked


TRL_MASKS_MORE = {  # or otherwise, than the template that people have shows; and why
    "deepseek": "the marker of the role, which stands in the generation prompt",
    "diffusion_gemma": "no token that ends a call, no reasoning of earlier turns",
    "glm4moe": "the marker of the next turn, where ours ends in EOS; no reasoning of earlier turns",
    "gptoss": "the beginning of the generation prompt; within a conversation <|end|>, which ends no answer",
    "muse_glimmer": "the beginning of the generation prompt",
    "nemotron": "<think>, which the generation prompt opens; no reasoning of earlier turns",
    "phi3": "the EOS that closes whole conversations, which no model is asked for",
    "qwen3_5_nothink": "the empty reasoning, which the generation prompt holds",
    "qwen3_5_think": "<think>, which the generation prompt opens",
    "qwen3_6": "<think>, which the generation prompt opens",
    "qwen3_8": "<think>, which the generation prompt opens",
}


@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}_training" in NAMES])
def test_of_the_templates_that_people_have_the_same_is_learnt_as_of_those_that_are_marked_for_training(name):
    tokenizer, marked = template_tokenizer(name), template_tokenizer(f"{name}_training")
    differs = []
    for shape in SHAPES:
        row = row_of(shape)
        if what_is_lost(tokenizer, row) is None and what_is_lost(marked, row) is None:
            ids, mask = masked_by_transformers(marked, row, len(row["messages"]))
            theirs = marked.decode([token for token, is_masked in zip(ids, mask, strict=True) if is_masked])
            ours = "".join(text for example in learn(tokenizer, row) for text in example.texts)
            differs.append(ours.replace("\n", "") != theirs.replace("\n", ""))  # they mark line breaks after the end
    assert any(differs) == name.startswith(tuple(TRL_MASKS_MORE))


@pytest.mark.parametrize("name", NAMES)
def test_streamed_rows_become_the_same_examples(name, tmp_path):
    tokenizer = template_tokenizer(name)
    rows = [row for row in map(row_of, SHAPES) if what_is_lost(tokenizer, row) is None]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    prepared = SFTDataModule(tokenizer, path)
    streamed = SFTDataModule(tokenizer, path, streaming=True, shuffle_buffer=1, batch_size=1)
    for data in (prepared, streamed):
        data.setup("fit")
    steps = iter(streamed.training_rows.loader(None, None, LoaderOptions(tokenizer, "padded")))
    for example in prepared.training_rows.rows.to_list():
        ((batch,),) = [next(steps).microbatches]
        assert batch.locations == [example["location"]]
        assert batch.labels[0].tolist() == example["input_ids"][1:]
        assert batch.response_mask.sum() == example["num_response_tokens"]


def masked_by_transformers(tokenizer: PreTrainedTokenizerBase, row: dict, length: int) -> tuple[list[int], list[bool]]:
    for parts in (False, True):
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}] if parts else message["content"]}
            for message in row["messages"][:length]
        ]
        try:
            encoded = tokenizer.apply_chat_template(
                messages, tools=row["tools"], return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError:
            continue
        if "Question" in tokenizer.decode(encoded["input_ids"]):
            return encoded["input_ids"], list(map(bool, encoded["assistant_masks"]))
    raise AssertionError(row)


WORDS, OTHERS = st.text("abc .\n", max_size=8), st.text("XYZ \n", max_size=8)
FUNCTION = st.fixed_dictionaries({"name": st.just("f"), "arguments": st.fixed_dictionaries({"a": WORDS})})
MORE = {
    "reasoning_content": WORDS,
    "weight": st.sampled_from([0, 1]),
    "tool_calls": st.lists(st.fixed_dictionaries({"function": FUNCTION}), max_size=2),
}
QUESTION, ANSWER = st.builds(user, OTHERS), st.builds(assistant, WORDS)
TURN = st.builds(lambda text, more: assistant(text, **more), WORDS, st.fixed_dictionaries({}, optional=MORE))
RESULT = st.builds(lambda text: {"role": "tool", "name": "f", "content": text}, OTHERS)
SYSTEM = st.builds(lambda text: {"role": "system", "content": text}, OTHERS)
EXCHANGE = st.one_of(
    st.tuples(QUESTION, ANSWER),
    st.tuples(QUESTION, TURN),
    st.tuples(QUESTION, TURN, RESULT, TURN),
    st.tuples(st.one_of(QUESTION, TURN, RESULT, SYSTEM)),
)
CONVERSATION = st.builds(
    lambda system, exchanges: [*system, *chain(*exchanges)],
    st.lists(SYSTEM, max_size=1),
    st.lists(EXCHANGE, min_size=1, max_size=4),
)


@pytest.mark.parametrize("name", ["deepseekv3", "gemma4_v5", "glm4moe", "gptoss", "llama3", "phi3", "qwen3", "qwen3_6"])
@settings(deadline=None, max_examples=40)
@given(messages=CONVERSATION, mode=st.sampled_from(["all", "last"]))
def test_of_any_conversation_no_word_of_another_role_is_learnt(name, messages, mode):
    tokenizer = template_tokenizer(name)
    try:
        examples = learn(tokenizer, {"messages": messages}, mode)
    except SettingsError:
        return
    learnt = [message for message in messages if message["role"] == "assistant" and message.get("weight") != 0]
    for example in examples:
        assert not set("XYZ") & set("".join(example.texts))
        assert all(messages[index] in learnt for index in example.turns)
