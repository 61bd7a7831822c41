"""Rows that are tokenised already: used as they are, and learnt where their columns say so."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.models import character_tokenizer
from support.rows import encode, json_lines, refusal, write

from lightning_sft import SFTDataModule
from lightning_sft.data.rows.token_rows import read_prompt_tokens

IDS = [97, 98, 99, 100, 101]
NO = -100
# For each row: its columns, and the positions of the tokens that are learnt.
ROWS = {
    "ids alone": ({}, [1, 2, 3, 4]),
    "labels": ({"labels": [NO, NO, 99, 100, NO]}, [2, 3]),
    "response_mask": ({"response_mask": [False, True, True, False, True]}, [1, 2, 4]),
    "completion_mask": ({"completion_mask": [0, 0, 0, 1, 1]}, [3, 4]),
    "assistant_masks": ({"assistant_masks": [1, 0, 1, 0, 1]}, [2, 4]),
    "a first token": ({"completion_mask": [1, 1, 0, 0, 0]}, [1]),
    "several": (
        {"labels": IDS, "completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1, 1]},
        [3, 4],
    ),
    "a column of nothing": ({"labels": None, "completion_mask": [0, 0, 0, 0, 1]}, [4]),
    "attention": ({"attention_mask": [1] * 5, "position_ids": [0, 1, 2, 3, 4], "seq_lengths": [5]}, [1, 2, 3, 4]),
}


def marked(rows, **options):
    """Of each row: its ids, and the positions that are learnt, as training has them."""
    data = SFTDataModule(character_tokenizer(), rows, batch_size=1, layout="padded", **options)
    data.setup("fit")
    found = []
    for step in data.train_dataloader():
        (batch,) = step.microbatches
        ids = [*batch.input_ids[0].tolist(), batch.labels[0, -1].item()]
        found.append((batch.locations, ids, (batch.response_mask[0].nonzero().flatten() + 1).tolist()))
    return [(ids, positions) for _, ids, positions in sorted(found)]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("source", ["list", "JSONL", "data set"])
def test_tokens_are_learnt_where_all_columns_say_so(tmp_path, kind, source):
    more, expected = ROWS[kind]
    rows = [{"input_ids": IDS, **more}]
    data = {"list": rows, "JSONL": write(tmp_path / "a.jsonl", json_lines(*rows)), "data set": Dataset.from_list(rows)}
    assert marked(data[source]) == [(IDS, expected)]


def test_streamed_tokens_are_the_same(tmp_path):
    rows = [{"input_ids": IDS, **more} for more, _ in ROWS.values()]
    path = write(tmp_path / "a.jsonl", json_lines(*rows))
    data = SFTDataModule(character_tokenizer(), path, batch_size=len(rows), streaming=True, layout="padded")
    data.setup("fit")
    (batch,) = next(iter(data.train_dataloader())).microbatches
    found = [(mask.nonzero().flatten() + 1).tolist() for mask in batch.response_mask]
    assert sorted(found) == sorted(expected for _, expected in ROWS.values())


@pytest.mark.parametrize(("mask", "expected"), [([0, 0, 1, 1, 1], [99, 100, 101]), ([1, 1, 1, 0, 0], [97, 98, 99])])
def test_padding_is_left_out(mask, expected):
    row = {"input_ids": IDS, "attention_mask": mask, "labels": IDS}
    assert [ids for ids, _ in marked([row])] == [expected]


def test_long_rows_are_dropped_or_cut_and_no_eos_is_added():
    rows = [{"input_ids": IDS}, {"input_ids": IDS[:3], "completion_mask": [0, 1, 1]}]
    assert marked(rows, max_length=4, too_long="truncate") == [(IDS[:4], [1, 2, 3]), (IDS[:3], [1, 2])]
    assert marked(rows, max_length=4, too_long="drop") == [(IDS[:3], [1, 2])]
    assert "5 tokens (0 of the prompt) exceed `max_length` = 4" in refusal(rows, max_length=4)


def test_ids_and_masks_may_be_arrays_or_tensors():
    row = {"input_ids": np.array(IDS), "completion_mask": torch.tensor([0, 0, 1, 1, 1])}
    expected = marked([{"input_ids": IDS, "completion_mask": [0, 0, 1, 1, 1]}])
    assert marked([row]) == marked([{"input_ids": list(np.array(IDS)), "completion_mask": [0, 0, 1, 1, 1]}]) == expected
    assert marked([{"text": "a"}], row_transform=lambda _: row) == expected
    assert "`input_ids` has [97" in refusal([{"input_ids": np.array([IDS, IDS])}])


def test_prompts_are_the_texts_before_the_last_tokens_that_are_learnt():
    rows = [
        {"input_ids": IDS, "completion_mask": [0, 1, 0, 1, 1], "ground_truth": "x"},
        {"input_ids": IDS, "completion_mask": [0] * 5},
        {"input_ids": IDS},
    ]
    assert [read_prompt_tokens(row).input_ids for row in rows] == [IDS[:3], IDS, IDS]
    data = SFTDataModule(character_tokenizer(), rows[:1], val_data=[rows[0], rows[2]], predict_data=rows)
    for stage, prompts in (("validate", ["abc", ""]), ("predict", ["abc", "abcde", "abcde"])):
        data.setup(stage)
        found = data.prompts(stage)
        assert [(each.text, each.as_written) for each in found] == [(prompt, True) for prompt in prompts]
        assert (found[0].ground_truth, found[-1].ground_truth) == ("x", None)
    assert encode(rows[:1]).dataset["output"][:] == ["de"]


def test_tokens_come_before_text_unless_a_column_is_named_and_that_is_told(caplog):
    row = {"input_ids": IDS, "prompt": "a", "output": "b", "text": "c"}
    with pytest.warns(match="nothing uses the columns `output`, `prompt`, `text`. `input_ids` is used instead"):
        assert marked([row]) == [(IDS, [1, 2, 3, 4])]
    for options in ({"prompt_field": "text"}, {"output_field": "text"}, {"text_field": "text"}):
        assert all(ids != IDS for ids, _ in marked([row], **options))


def test_other_ids_or_marks_are_other_rows_to_the_cache_and_to_a_run():
    states = []
    for row in ({"input_ids": IDS}, {"input_ids": IDS[::-1]}, {"input_ids": IDS, "completion_mask": [0, 0, 1, 1, 1]}):
        data = SFTDataModule(character_tokenizer(), [row])
        data.setup("fit")
        states.append(data.training_rows.state(0)["rows"])
    assert len(set(states)) == 3


REFUSED = {
    "text": ({"input_ids": "[1]"}, "`input_ids` is '[1]' of type str, expected a list of whole numbers."),
    "a fraction": ({"input_ids": [1, 2.0]}, "`input_ids` has 2.0 at position 1, expected a whole number."),
    "lists": ({"input_ids": [[1, 2]]}, "`input_ids` has [1, 2] at position 0, expected a whole number."),
    "none": ({"input_ids": []}, "no token is learnt of its 0: `input_ids` must mark one that has another before it."),
    "other lengths": ({"labels": [97]}, "`labels` has 1 values, but `input_ids` has 5."),
    "another length of the mask": ({"attention_mask": [1]}, "`attention_mask` has 1 values, but `input_ids` has 5."),
    "a weight": ({"completion_mask": [0, 0, 2, 1, 1]}, "`completion_mask` has 2 at position 2, expected 0 or 1."),
    "other labels": (
        {"labels": [NO, 98, 7, NO, NO]},
        "`labels` has 7 at position 2, expected -100 or the id there, 99.",
    ),
    "shifted labels": (
        {"labels": [NO, 99, 100, 101, NO]},
        "`labels` has 99 at position 1, expected -100 or the id there, 98. The labels are shifted by one: undo the "
        "shift, as for `transformers`.",
    ),
    "nothing learnt": (
        {"labels": [NO] * 5, "completion_mask": [1] * 5},
        "no token is learnt of its 5: `labels` and `completion_mask` must mark one that has another before it. Remove "
        "the row.",
    ),
    "only the first": ({"completion_mask": [1, 0, 0, 0, 0]}, "no token is learnt of its 5: `completion_mask` must"),
    "a high id": (
        {"input_ids": [97, 4000]},
        "`input_ids` has 4000 at position 1, but the tokenizer's ids end at 130. Give the tokenizer that made the row.",
    ),
    "a low id": ({"input_ids": [97, -1]}, "`input_ids` has -1 at position 1, but the tokenizer's ids end at 130."),
    "holes": ({"attention_mask": [1, 0, 1, 1, 1]}, "`attention_mask` has 0 between tokens; expected it at the start"),
    "packed by positions": (
        {"position_ids": [0, 1, 0, 1, 2]},
        "`position_ids` does not count from 0 to the end: several texts are packed into the row. Give each a row",
    ),
    "a mask by another name": (
        {"loss_mask": [0, 0, 1, 1, 1]},
        "the row has `input_ids` and `loss_mask`, but programs differ in what that means. With a `row_transform`, give",
    ),
    "packed by lengths": ({"seq_lengths": [2, 3]}, "`seq_lengths` has 2 values: several texts are packed"),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_wrong_with_tokens_is_told_with_the_row_or_left_out(problem):
    more, message = REFUSED[problem]
    rows = [{"input_ids": IDS}, {"input_ids": IDS, **more}]
    assert refusal(rows).startswith(f"row 2 of `train_data`: {message}")
    left = encode(rows, bad_rows="drop")
    assert (len(left.dataset), left.report.bad_rows.total) == (1, 1)
