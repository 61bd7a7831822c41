"""Data as users see it before training: the batch's own mask, every character, statistics."""

import html
import re
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.models import character_tokenizer
from support.rows import write_lines
from transformers import AutoTokenizer

from lightning_sft import SFTDataModule
from lightning_sft.data.steps.marked_rows import MarkedRow, marked_rows
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.plan import StepTotals
from lightning_sft.data.tokens.collation import collate_packed, collate_padded
from lightning_sft.data.tokens.tokenization import encode_examples

COLLATE = {"padded": collate_padded, "packed": collate_packed}
TEXTS = ["ab", "c"], ["<x>\n", "y z"]
GREEN = "#2ea043"


def batch_of(layout="padded", tokenizer=None, prompts=TEXTS[0], outputs=TEXTS[1]):
    tokenizer = tokenizer or character_tokenizer()
    examples = encode_examples(prompts, outputs, tokenizer, append_eos=True)
    return OptimizerStep([COLLATE[layout](examples, tokenizer.eos_token_id)], StepTotals(), tokenizer)


def shown(page):
    """Prompt and response tokens that a page shows, in order, and its words without any tag."""
    tokens = re.findall(r"<span style=background:(#\w+)>([^<]*)</span>", page)
    prompt, response = (
        [html.unescape(text) for colour, text in tokens if colour.startswith(GREEN) == is_response]
        for is_response in (False, True)
    )
    return prompt, response, html.unescape(re.sub("<[^>]*>", "", page))


@pytest.mark.parametrize("layout", COLLATE)
def test_a_batch_shows_every_token_under_its_mask(layout):
    prompt, response, words = shown(batch_of(layout)._repr_html_())
    assert prompt == ["a", "b", "c"]
    assert response == ["<", "x", ">", "↵\n", "<eos>", "y", " ", "z", "<eos>"]
    assert words.startswith("2 sequences, 12 tokens, 9 response tokens (75.0%, coloured), 1 microbatch")
    assert "7 tokens, 5 response tokens" in words
    assert ("2 \N{MULTIPLICATION SIGN} <eos>" in words) == (layout == "padded")


@pytest.mark.parametrize("layout", COLLATE)
def test_a_wrong_mask_shows(layout):
    batch = batch_of(layout)
    mask = batch.microbatches[0].response_mask
    mask[0, 0], mask[0, 2], mask[0, 5] = True, False, False  # b, x and the EOS
    prompt, response, _ = shown(batch._repr_html_())
    assert prompt[:4] == ["a", "x", "<eos>", "c"] if layout == "packed" else ["a", "x", "c"]
    assert response[:4] == ["b", "<", ">", "↵\n"]


def test_what_a_page_cannot_show_as_it_is_gets_a_sign(shared_data):
    qwen = AutoTokenizer.from_pretrained(shared_data / "qwen2_tokenizer")
    page = batch_of("packed", qwen, ["<script>alert(1)</script>\t"], ["龘\u202e\u00a0&amp;"])._repr_html_()
    assert "<script" not in page
    prompt, response, _ = shown(page)
    assert "".join(prompt) == "<script>alert(1)</script>⇥"
    assert response[:2] == ["·", "龘"]  # one character of two tokens
    assert "".join(response[2:]).replace("·", "") == r"\u202e\xa0&amp;<|endoftext|>"


def test_a_page_stays_small_and_says_what_it_leaves_out():
    page = batch_of(prompts=["<" * 1000] * 20, outputs=["\n" * 1000] * 20)._repr_html_()
    assert len(page) < 100_000
    assert "… and 12 sequences more" in page
    assert shown(page)[2].startswith("20 sequences, 40,020 tokens, 20,020 response tokens")


@given(st.integers(0, 60), st.integers(0, 60), st.integers(8, 40))
def test_of_a_long_row_the_middles_are_left_out_and_counted(num_prompt, num_response, limit):
    marks = [False, *[False] * num_prompt, *[True] * num_response]
    runs = list(MarkedRow("", list(range(len(marks))), marks).runs(None, limit))
    tokens = [(mark, position) for mark, tokens in runs if mark is not None for position, _ in tokens]
    left_out = sum(int(re.search(r"\d+", tokens[0][1])[0]) for mark, tokens in runs if mark is None)
    assert len(tokens) == min(len(marks), limit)
    assert left_out == len(marks) - len(tokens)
    assert all(marks[position] == mark for mark, position in tokens)
    assert tokens[0][1] == 0
    assert tokens[-1][1] == len(marks) - 1
    boundary = {num_prompt, num_prompt + 1} & set(range(len(marks)))
    assert boundary <= {position for _, position in tokens}  # where the prompt ends and the response begins


def test_a_stand_in_is_not_shown():
    microbatch = collate_packed([])
    assert list(marked_rows(microbatch)) == []
    assert "0 sequences, 0 tokens" in OptimizerStep([microbatch], StepTotals())._repr_html_()


# -- what loaders give -------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"{i}=", "output": "x" * (1 + i % 5)} for i in range(10)]


def prepared(**changes):
    data = SFTDataModule(character_tokenizer(), **({"train_data": ROWS, "batch_size": 4} | changes))
    data.setup("fit")
    return data


def test_a_loader_s_batch_shows_itself_with_and_without_workers():
    pages = [next(iter(prepared(num_workers=workers).train_dataloader()))._repr_html_() for workers in (0, 1)]
    assert pages[0] == pages[1]
    prompt, response, words = shown(pages[0])
    assert set(prompt) <= set("0123456789=")
    assert set(response) == {"x", "<eos>"}
    assert re.search(r"row \d+: \d tokens, \d response tokens", words)


# -- preview -----------------------------------------------------------------------------------------------------------


def test_a_preview_in_words():
    rows = [{"prompt": "a\nb", "output": "xy"}, {"prompt": "c", "output": "z"}, {"prompt": "c" * 9, "output": "z"}]
    data = SFTDataModule(character_tokenizer(), rows, batch_size=1, max_length=8, too_long="drop", val_data=rows[:1])
    assert [re.sub(" {2,}", "  ", line.rstrip()) for line in str(data.preview(1)).splitlines()] == [
        "row 1: 6 tokens, 3 response tokens",
        "prompt  │a│↵│",
        "  │b│",
        "response  │x│y│<eos>│",
        "",
        "  train  val",
        "rows  2  1",
        "dropped, longer than `max_length` = 8 tokens  1  0",
        "tokens  9  6",
        "of these response tokens  55.6%  50.0%",
        "tokens of a row, shortest  3  6",
        "tokens of a row, median  3  6",
        "tokens of a row, 95th percentile  6  6",
        "tokens of a row, longest  6  6",
        "optimizer steps per epoch  2",
    ]
    assert shown(data.preview(1)._repr_html_())[:2] == (["a", "↵\n", "b"], ["x", "y", "<eos>"])


def test_a_preview_counts_as_the_training_does():
    data = prepared(val_fraction=0.3)
    train, val = (data.preview().splits[name] for name in ("train", "val"))
    assert (len(train.num_tokens), len(val.num_tokens)) == (7, 3)
    batches = list(data.train_dataloader())
    assert train.steps_per_epoch == len(batches) == 2
    assert train.num_response_tokens.sum() == sum(batch.totals.num_response_tokens for batch in batches)
    assert val.steps_per_epoch is None
    assert np.sort(np.concatenate([train.num_tokens, val.num_tokens])).tolist() == sorted(4 + i % 5 for i in range(10))


def test_brackets_in_the_name_of_a_file_are_no_markup(tmp_path):
    paths = [write_lines(tmp_path / name, ROWS[0], ROWS[1]) for name in ("part[a].jsonl", "part[b].jsonl")]
    words = str(prepared(train_data={paths[0]: 2, paths[1]: 1}).preview(0))
    assert "part[a].jsonl (weight 2, 4 rows in each epoch)" in words


def test_a_terminal_shows_colours_in_the_place_of_bars(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, pages = {"force_terminal": True, "color_system": "256"}, []
    for options in (terminal, terminal | {"no_color": True}, {"force_terminal": False}):
        console = Console(file=StringIO(), width=100, **options)
        console.print(prepared().preview(1))
        pages.append(console.file.getvalue())
    coloured, *plain = pages
    assert "│" not in coloured
    assert re.search(r"\x1b\[30;48;5;\d+mx\x1b", coloured)  # black on a colour
    assert all("│0│=│" in page and "│x│<eos>│" in page for page in plain)


def test_a_preview_refuses_what_is_no_number_of_rows():
    with pytest.raises(ValueError, match="`num_rows` is -1, expected at least 0"):
        prepared().preview(-1)
    with pytest.raises(TypeError, match="`num_rows` is 'a' of type str, expected a whole number"):
        prepared().preview("a")
