"""From conversations to token ids, batches, prompts and generation."""

import datasets
import lightning as L
import pytest
import torch
from support.chat import (
    CALLED,
    CHATML,
    FORMATS,
    LLAMA3,
    LONG,
    MISTRAL,
    QWEN,
    TOOL,
    WITH_TOOLS,
    assistant,
    chat_tokenizer,
    encode,
    responses,
    user,
)
from support.models import tiny_config
from transformers import AutoTokenizer

from lightning_sft import GenerationMonitor, Sampling, SFTDataModule, SFTModule
from lightning_sft.data.chat.chat_encoding import ChatEncoder, end_of_turn_id
from lightning_sft.data.chat.chat_template import ChatTemplate, with_chat_template
from lightning_sft.data.chat.conversation import read_conversation
from lightning_sft.data.encoded_rows import content_hash
from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.data.steps.step_loader import LoaderOptions
from lightning_sft.data.tokens.tokenization import encode_prompts


@pytest.mark.parametrize("name", FORMATS)
def test_the_ids_are_those_of_the_template(name):
    tokenizer = chat_tokenizer(FORMATS[name][0])
    (row,) = encode([{"messages": LONG}], tokenizer)
    assert row["input_ids"] == tokenizer.apply_chat_template(LONG)["input_ids"]
    texts = responses(row, tokenizer)
    assert row["num_response_tokens"] == len(tokenizer("".join(texts), add_special_tokens=False)["input_ids"])


def test_the_real_qwen2_tokenizer(shared_data):
    tokenizer = with_chat_template(AutoTokenizer.from_pretrained(shared_data / "qwen2_tokenizer"), QWEN)
    messages = [user("Wie spät ist es?"), assistant("  Fünf — 五点.\n"), *WITH_TOOLS]
    encoder, conversation = ChatEncoder(tokenizer), read_conversation({"m": messages, "tools": [TOOL]}, ["m"])
    (encoded,) = encoder.encode(encoder.write(conversation))
    row = encoded.example
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


@pytest.mark.parametrize("options", [{}, {"max_length": 30, "too_long": "truncate"}])
def test_padded_and_packed_batches_mark_the_same_tokens_and_the_plan_knows_how_many(options):
    tokenizer = chat_tokenizer(CHATML)
    rows = [{"messages": LONG}, {"prompt": "a", "output": "b"}, {"messages": LONG[:2]}]
    marked = {}
    for layout in ("padded", "packed"):
        data = SFTDataModule(tokenizer, rows, batch_size=3, **options)
        data.setup("fit")
        (step,) = data.training_rows.loader(None, None, LoaderOptions(tokenizer, layout))
        (batch,) = step.microbatches
        assert step.totals.num_response_tokens == batch.response_mask.sum() == len(batch.response_positions)
        marked[layout] = tokenizer.decode(batch.labels[batch.response_mask])
    expected = "4.<|im_end|>6!<|im_end|>" if not options else "4.<|im_end|>"
    assert marked["padded"] == marked["packed"]
    assert sorted(marked["padded"]) == sorted(expected + "b<eos>" + "4.<|im_end|>")


def test_the_prompt_to_generate_from_is_the_conversation_up_to_the_last_turn():
    tokenizer = chat_tokenizer()
    data = SFTDataModule(
        tokenizer,
        [{"messages": LONG}, {"messages": LONG, "ground_truth": "six"}],
        predict_data=[
            {"messages": LONG[:3]},
            {"messages": LONG},
            {"prompt": LONG[:1]},
            {"prompt": "plain"},
            {"messages": [LONG[0], WITH_TOOLS[1]]},
        ],
        chat_template=LLAMA3,
    )
    data.setup("fit")
    data.setup("predict")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    first = "<bos>" + header.format("user") + "2+2?<|eot_id|>" + header.format("assistant")
    whole = first + "4.<|eot_id|>" + header.format("user") + "3+3?<|eot_id|>" + header.format("assistant")
    assert [(prompt.text, prompt.ground_truth) for prompt in data.prompts("fit")] == [(whole, "6!"), (whole, "six")]
    assert data.training_rows.rows["output"] == ["6!", "6!"]
    assert data.prompts("predict") == [
        Prompt(0, whole, None, as_written=True),
        Prompt(1, whole, "6!", as_written=True),
        Prompt(2, first, None, as_written=True),
        Prompt(3, "plain", None, as_written=False),
        Prompt(4, first, None, as_written=True),
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
    assert renders(QWEN, tools=[TOOL])
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


def test_a_template_may_be_that_of_another_tokenizer(tmp_path):
    chat_tokenizer(LLAMA3).save_pretrained(tmp_path / "instruct")
    chat_tokenizer({"default": CHATML, "rag": LLAMA3}).save_pretrained(tmp_path / "two")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    for name, expected in (("instruct", LLAMA3), ("two", CHATML)):
        data = SFTDataModule(chat_tokenizer(), [], chat_template=str(tmp_path / name))
        assert data.tokenizer.chat_template == expected
    with pytest.raises(
        ValueError, match=r"base', a tokenizer without a chat template\. Give the template's text, a file"
    ):
        SFTDataModule(chat_tokenizer(), [], chat_template=str(tmp_path / "base"))
    with pytest.raises(FileNotFoundError, match=r"nor does it name a tokenizer that can be loaded\. Give the"):
        SFTDataModule(chat_tokenizer(), [], chat_template=str(tmp_path / "nowhere"))


MARKED_BEYOND_THE_END = LLAMA3.replace("{% endfor %}", "{% generation %}{{ '\n' }}{% endgeneration %}{% endfor %}", 1)


@pytest.mark.parametrize("template", [None, LLAMA3, MARKED_BEYOND_THE_END])
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
