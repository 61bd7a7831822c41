from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from adapters import run_tokenize_prompt_and_output
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hub import FIRST, SECOND, CachedModel
from support.models import character_tokenizer
from tokenizers import processors
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from lightning_sft.data.tokens.collation import collate_packed, collate_padded
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.tokenization import (
    encode_examples,
    encode_prompts,
    pad_token_id,
    prompt_prefix,
    token_texts,
    tokenize_prompt_and_output,
)
from lightning_sft.data.tokens.tokenizer import load_tokenizer
from lightning_sft.errors import SettingsError

EOS, BOS, PAD = 128, 129, 130  # of the character tokenizer
A, B, C, D, X, Y, Z = map(ord, "abcdxyz")
T, F = True, False


def eos_adding_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """The character tokenizer, with a post-processor that adds special tokens as the template says."""
    tokenizer = character_tokenizer(bos=True)
    special = [("<bos>", BOS), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@cache
def pretrained(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def as_lists(batch: dict[str, Tensor]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_tokenize_prompt_and_output_equals_the_published_snapshot(shared_data):
    texts = ["Hello, world!", "This is a test.", "This is another test."]
    batch = run_tokenize_prompt_and_output(texts, texts, pretrained(shared_data / "qwen2_tokenizer"))
    expected = np.load(shared_data / "cs336_snapshots" / "test_tokenize_prompt_and_output.npz")
    assert set(batch) == set(expected)
    for name in expected:
        torch.testing.assert_close(batch[name], torch.from_numpy(expected[name]))


def test_tokenize_prompt_and_output_shifts_and_pads_as_spelled_by_hand():
    batch = tokenize_prompt_and_output(["abc", "a", "ab"], ["x", "xyz", "xyz"], character_tokenizer(pad=True))
    assert as_lists(batch) == {
        # tokens:     a  b  c  x  pad     a  x  y  z  pad       a  b  x  y  z
        "input_ids": [[A, B, C, X], [A, X, Y, Z], [A, B, X, Y]],
        "labels": [[B, C, X, PAD], [X, Y, Z, PAD], [B, X, Y, Z]],
        "response_mask": [[F, F, T, F], [T, T, T, F], [F, T, T, T]],
    }


def test_tokenize_prompt_and_output_returns_integers_and_a_boolean_mask_of_one_shape():
    batch = tokenize_prompt_and_output(["abcd", "a"], ["xyz", "x"], character_tokenizer())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 6)),
        "labels": (torch.int64, (2, 6)),
        "response_mask": (torch.bool, (2, 6)),
    }


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.text("abc", max_size=5), st.text("xyz", max_size=5)), min_size=1, max_size=4), st.booleans()
)
def test_tokenize_prompt_and_output_marks_exactly_the_response_of_any_pair(pairs, bos):
    prompts, outputs = zip(*pairs, strict=True)
    batch = tokenize_prompt_and_output(prompts, outputs, character_tokenizer(bos=bos))
    longest = max(bos + len(prompt) + len(output) for prompt, output in pairs)
    assert batch["labels"].shape == (len(pairs), max(longest - 1, 0))
    for row, (prompt, output) in enumerate(pairs):
        ids = [BOS] * bos + [ord(character) for character in prompt + output]
        assert batch["input_ids"][row, : len(ids)].tolist() == ids[: batch["input_ids"].shape[1]]
        response = batch["labels"][row][batch["response_mask"][row]]
        assert "".join(map(chr, response)) == (output if bos or prompt else output[1:])


def test_tokenize_prompt_and_output_never_adds_a_bos_to_the_response():
    batch = tokenize_prompt_and_output(["ab", "a"], ["xy", "x"], character_tokenizer(bos=True, pad=True))
    assert as_lists(batch) == {
        "input_ids": [[BOS, A, B, X], [BOS, A, X, PAD]],
        "labels": [[A, B, X, Y], [A, X, PAD, PAD]],
        "response_mask": [[F, F, T, T], [F, T, F, F]],
    }


def test_tokenize_prompt_and_output_adds_no_second_bos_to_a_prompt_that_spells_it_out():
    batch = tokenize_prompt_and_output(["<bos>ab", "ab"], ["x", "x"], character_tokenizer(bos=True))
    assert batch["input_ids"].tolist() == [[BOS, A, B], [BOS, A, B]]
    assert batch["response_mask"].tolist() == [[F, F, T], [F, F, T]]


def test_tokenize_prompt_and_output_keeps_a_bos_that_the_output_itself_spells_out():
    batch = tokenize_prompt_and_output(["a"], ["<bos>x"], character_tokenizer(bos=True))
    assert batch["labels"].tolist() == [[A, BOS, X]]
    assert batch["response_mask"].tolist() == [[F, T, T]]


@pytest.mark.parametrize(("template", "prefix"), [("<bos> $A <eos>", [BOS]), ("$A <eos>", [])])
def test_tokenize_prompt_and_output_drops_the_eos_that_a_tokenizer_would_put_after_the_prompt(template, prefix):
    tokenizer = eos_adding_tokenizer(template)
    assert tokenizer("ab")["input_ids"] == [*prefix, A, B, EOS]  # what the tokenizer does of its own accord
    batch = tokenize_prompt_and_output(["ab"], ["xy"], tokenizer)
    assert batch["input_ids"].tolist() == [[*prefix, A, B, X]]
    assert batch["labels"].tolist() == [[*prefix, A, B, X, Y][1:]]


@pytest.mark.parametrize("with_eos", [True, False])
def test_tokenize_prompt_and_output_needs_no_pad_token(with_eos):
    tokenizer = character_tokenizer()
    if not with_eos:
        tokenizer.eos_token = None
    batch = tokenize_prompt_and_output(["ab", "a"], ["xy", "x"], tokenizer)
    fill = EOS if with_eos else 0
    assert batch["input_ids"].tolist() == [[A, B, X], [A, X, fill]]
    assert batch["labels"].tolist() == [[B, X, Y], [X, fill, fill]]


def test_tokenize_prompt_and_output_counts_an_eos_that_is_the_pad_token_too():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = "<eos>"
    batch = tokenize_prompt_and_output(["a", "ab"], ["x<eos>", "xy<eos>"], tokenizer)
    assert as_lists(batch) == {
        "input_ids": [[A, X, EOS, EOS], [A, B, X, Y]],
        "labels": [[X, EOS, EOS, EOS], [B, X, Y, EOS]],
        "response_mask": [[T, T, F, F], [F, T, T, T]],
    }


def test_tokenize_prompt_and_output_marks_nothing_for_an_empty_output():
    batch = tokenize_prompt_and_output(["abc", "a"], ["", "x"], character_tokenizer(pad=True))
    assert as_lists(batch) == {
        "input_ids": [[A, B], [A, X]],
        "labels": [[B, C], [X, PAD]],
        "response_mask": [[F, F], [T, F]],
    }


def test_tokenize_prompt_and_output_with_a_bos_counts_the_whole_response_to_an_empty_prompt():
    batch = tokenize_prompt_and_output([""], ["xy"], character_tokenizer(bos=True))
    assert as_lists(batch) == {"input_ids": [[BOS, X]], "labels": [[X, Y]], "response_mask": [[T, T]]}


def test_tokenize_prompt_and_output_without_a_bos_cannot_count_the_first_token_after_an_empty_prompt():
    batch = tokenize_prompt_and_output([""], ["xyz"], character_tokenizer())
    assert as_lists(batch) == {"input_ids": [[X, Y]], "labels": [[Y, Z]], "response_mask": [[T, T]]}


@pytest.mark.parametrize("bos", [True, False])
def test_tokenize_prompt_and_output_of_two_empty_texts_is_an_empty_row(bos):
    tokenizer = character_tokenizer(bos=bos, pad=True)
    alone = tokenize_prompt_and_output([""], [""], tokenizer)
    assert [tuple(tensor.shape) for tensor in alone.values()] == [(1, 0)] * 3
    beside = tokenize_prompt_and_output(["", "abc"], ["", "x"], tokenizer)
    assert beside["labels"][0].tolist() == [PAD] * (3 + bos)
    assert beside["response_mask"][0].tolist() == [F] * (3 + bos)


def test_tokenize_prompt_and_output_pads_right_whatever_the_tokenizer_prefers():
    tokenizer = character_tokenizer(pad=True)
    tokenizer.padding_side = "left"
    batch = tokenize_prompt_and_output(["ab", "a"], ["x", "x"], tokenizer)
    assert batch["input_ids"].tolist() == [[A, B], [A, X]]
    assert batch["labels"].tolist() == [[B, X], [X, PAD]]


def test_tokenize_prompt_and_output_never_truncates():
    tokenizer = character_tokenizer()
    tokenizer.model_max_length = 2
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    batch = tokenize_prompt_and_output(["abcd"], ["xyz"], tokenizer)
    assert batch["input_ids"].tolist() == [[A, B, C, D, X, Y]]


def test_tokenize_prompt_and_output_gives_labels_that_can_be_written_without_changing_the_input():
    batch = tokenize_prompt_and_output(["ab"], ["x"], character_tokenizer())
    batch["labels"][~batch["response_mask"]] = -100
    assert batch["input_ids"].tolist() == [[A, B]]


def test_tokenize_prompt_and_output_names_both_numbers_if_texts_do_not_pair_up():
    with pytest.raises(ValueError, match=r"`prompt_strs` and `output_strs` must pair up.* 2 prompts and 1 outputs"):
        tokenize_prompt_and_output(["a", "b"], ["x"], character_tokenizer())


def test_tokenize_prompt_and_output_takes_columns_of_a_table():
    """Whose truth is not that of a list; those of pandas are counted by an index of their own."""
    expected = run_tokenize_prompt_and_output(["ab", "c"], ["d", "ef"], character_tokenizer())
    table = pd.DataFrame({"prompt": ["ab", "c"], "output": ["d", "ef"]}, index=[5, 7])
    given = run_tokenize_prompt_and_output(table.prompt, table.output, character_tokenizer())
    for name in expected:
        assert torch.equal(given[name], expected[name])


def test_tokenize_prompt_and_output_refuses_to_make_a_batch_of_nothing():
    with pytest.raises(ValueError, match="are empty; expected at least one pair"):
        tokenize_prompt_and_output([], [], character_tokenizer())


def test_tokenize_prompt_and_output_with_qwen2_counts_the_eos_and_adds_nothing(shared_data):
    tokenizer = pretrained(shared_data / "qwen2_tokenizer")
    batch = tokenize_prompt_and_output(["Once upon", "Once upon"], [" a time<|endoftext|>", " a"], tokenizer)
    once, upon, a, time, eos = 12522, 5193, 264, 882, 151643
    assert as_lists(batch) == {
        "input_ids": [[once, upon, a, time], [once, upon, a, eos]],
        "labels": [[upon, a, time, eos], [upon, a, eos, eos]],
        "response_mask": [[F, T, T, T], [F, T, F, F]],
    }


def test_tokenize_prompt_and_output_with_stories260k_keeps_bos_in_the_prompt_alone_and_pads_with_eos(shared_data):
    tokenizer = pretrained(shared_data / "stories260k")
    batch = tokenize_prompt_and_output(["Once upon", "<s>Lily"], [" a time", "."], tokenizer)
    bos, eos, once, upon, space, a, time, lily, dot = 1, 2, 403, 407, 410, 261, 378, 317, 426
    assert as_lists(batch) == {
        "input_ids": [[bos, once, upon, space, a], [bos, lily, space, dot, eos]],
        "labels": [[once, upon, space, a, time], [lily, space, dot, eos, eos]],
        "response_mask": [[F, F, T, T, T], [F, T, T, F, F]],
    }


@pytest.mark.parametrize("folder", ["qwen2_tokenizer", "stories260k"])
def test_encode_prompts_equals_what_a_real_tokenizer_does_of_its_own_accord(shared_data, folder):
    tokenizer = pretrained(shared_data / folder)
    prompts = ["", "Once upon a time", " two  spaces\n", "é 你好 \U0001f600", "What is 1/2?"]
    assert encode_prompts(prompts, tokenizer) == [tokenizer(prompt)["input_ids"] for prompt in prompts]


def test_encode_prompts_adds_a_prefix_of_several_tokens_once_and_whole():
    tokenizer = eos_adding_tokenizer("<eos> <bos> $A")
    prompts = encode_prompts(["ab", "<eos><bos>ab", "<eos>ab", ""], tokenizer)
    assert prompts == [[EOS, BOS, A, B], [EOS, BOS, A, B], [EOS, BOS, EOS, A, B], [EOS, BOS]]


def test_encode_prompts_of_no_prompts_is_an_empty_list():
    assert encode_prompts([], character_tokenizer(bos=True)) == []


def test_prompt_prefix_finds_what_stands_before_and_ignores_what_stands_after():
    assert prompt_prefix(character_tokenizer()) == []
    assert prompt_prefix(character_tokenizer(bos=True)) == [BOS]
    assert prompt_prefix(eos_adding_tokenizer("$A <eos>")) == []
    assert prompt_prefix(eos_adding_tokenizer("<eos> <bos> $A <eos>")) == [EOS, BOS]


def test_pad_token_id_is_pad_or_else_eos_or_else_zero():
    bare = character_tokenizer()
    bare.eos_token = None
    tokenizers = [character_tokenizer(pad=True), character_tokenizer(), bare]
    assert [pad_token_id(tokenizer) for tokenizer in tokenizers] == [PAD, EOS, 0]


def test_pad_token_id_of_zero_is_a_pad_token_like_any_other():
    tokenizer = character_tokenizer()
    tokenizer.pad_token = chr(0)
    assert pad_token_id(tokenizer) == 0


def test_encode_examples_ends_each_response_in_eos_if_asked():
    examples = encode_examples(["ab", ""], ["x", ""], character_tokenizer(bos=True), append_eos=True)
    assert examples == [
        Example(input_ids=[BOS, A, B, X, EOS], num_prompt_tokens=3),
        Example(input_ids=[BOS, EOS], num_prompt_tokens=1),
    ]


def test_encode_examples_appends_no_eos_to_an_output_that_ends_in_it(shared_data):
    examples = encode_examples(["a<eos>"] * 4, ["x<eos>", "x<eos>y", "<eos>", ""], character_tokenizer(), True)
    assert [example.input_ids[2:] for example in examples] == [[X, EOS], [X, EOS, Y, EOS], [EOS], [EOS]]
    stories = pretrained(shared_data / "stories260k")
    with_eos, without = encode_examples(["Once"] * 2, ["upon</s>", "upon"], stories, append_eos=True)
    assert with_eos == without


def test_encode_examples_appends_no_eos_unless_asked():
    assert encode_examples(["a"], ["x"], character_tokenizer()) == [Example(input_ids=[A, X], num_prompt_tokens=1)]


def test_encode_examples_refuses_an_eos_that_the_tokenizer_does_not_have():
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`append_eos` is True, but the tokenizer has no EOS token"):
        encode_examples(["a"], ["x"], tokenizer, append_eos=True)


def test_encode_examples_of_no_pairs_is_an_empty_list():
    assert encode_examples([], [], character_tokenizer()) == []


@pytest.mark.parametrize("num_prompt_tokens", range(4))
@pytest.mark.parametrize("num_output_tokens", range(4))
def test_num_response_labels_counts_what_the_mask_marks(num_prompt_tokens, num_output_tokens):
    num_tokens = num_prompt_tokens + num_output_tokens
    examples = [
        Example(input_ids=[A] * num_tokens, num_prompt_tokens=num_prompt_tokens),
        Example(input_ids=[A] * 9, num_prompt_tokens=9),  # for padding beside it
    ]
    marked = collate_padded(examples).response_mask
    assert examples[0].num_response_labels == marked[0].sum()


def test_packed_rows_stand_one_after_another_each_shifted_on_its_own():
    examples = [
        Example(input_ids=[5, 6, 7, 8], num_prompt_tokens=2, location="row 1"),
        Example(input_ids=[9, 4], num_prompt_tokens=0, location="row 2"),
        Example(input_ids=[3], num_prompt_tokens=0, location="row 3"),  # nothing comes after it
        Example(input_ids=[1, 2, 0], num_prompt_tokens=3, location="row 4"),
    ]
    batch = collate_packed(examples)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 1, 2]]
    assert batch.labels.tolist() == [[6, 7, 8, 4, 2, 0]]
    assert batch.response_mask.tolist() == [[False, True, True, True, False, False]]
    assert batch.response_positions.tolist() == [1, 2, 3]
    assert batch.locations == ["row 1", "row 2", "row 4"]
    inputs = batch.model_inputs()
    assert {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()} == {
        "position_ids": [[0, 1, 2, 0, 0, 1]],
        "cu_seq_lens_q": [0, 3, 4, 6],
        "cu_seq_lens_k": [0, 3, 4, 6],
        "max_length_q": 3,
        "max_length_k": 3,
    }
    assert {ids.dtype for ids in (batch.input_ids, batch.labels, inputs["position_ids"])} == {torch.int64}
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert batch.response_mask.dtype == torch.bool


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_without_any_example_a_microbatch_is_one_masked_token_of_no_sequence(collate):
    batch = collate([], pad_id=7)
    assert batch.input_ids.tolist() == batch.labels.tolist() == [[7]]
    assert batch.response_mask.tolist() == [[False]]
    assert batch.num_sequences == 0


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_packed_and_padded_hold_the_same_labels_and_mask(sizes):
    examples = [
        Example(input_ids=list(range(10 * row, 10 * row + length)), num_prompt_tokens=min(prompt, length))
        for row, (length, prompt) in enumerate(sizes)
    ]
    padded, packed = collate_padded(examples), collate_packed(examples)
    real = torch.arange(padded.labels.shape[1]) < torch.tensor([[length - 1] for length, _ in sizes])
    for name in ("input_ids", "labels", "response_mask"):
        assert getattr(packed, name)[0].tolist() == getattr(padded, name)[real].tolist()


# -- tokens as texts ---------------------------------------------------------------------------------------------------


def test_the_token_that_completes_a_character_has_it_whole(shared_data):
    tokenizer = pretrained(shared_data / "qwen2_tokenizer")
    ids = tokenizer("你好 龘x<|endoftext|>")["input_ids"]
    assert token_texts(tokenizer, ids) == ["你好", "", "", " 龘", "x", "<|endoftext|>"]
    assert token_texts(tokenizer, ids[:3]) == ["你好", "", " \ufffd"]  # nothing is lost where a text is cut
    tokenizer = pretrained(shared_data / "stories260k")
    assert token_texts(tokenizer, tokenizer("He🙂")["input_ids"]) == ["<s>", " He", "", "", "", "🙂"]


def test_a_character_tokenizer_s_tokens_are_its_characters():
    assert token_texts(character_tokenizer(), [A, ord(" "), ord("\n"), EOS, B]) == ["a", " ", "\n", "<eos>", "b"]
    assert token_texts(character_tokenizer(), torch.tensor([A])) == ["a"]
    assert token_texts(character_tokenizer(), []) == []


def test_a_tokenizer_in_python_has_its_tokens_told_apart_too():
    assert token_texts(ByT5Tokenizer(), ByT5Tokenizer()("a🙂b")["input_ids"]) == ["a", "", "", "", "🙂", "b", "</s>"]


@pytest.mark.parametrize("folder", ["qwen2_tokenizer", "stories260k"])
def test_the_pieces_of_any_tokens_are_what_decoding_them_gives(shared_data, folder):
    tokenizer = pretrained(shared_data / folder)
    text = tokenizer("  It 's , a\n\n\té 🤦🏽\u200d♂️ 你好 龘 ." + str(tokenizer.eos_token) + " end")["input_ids"]

    @settings(deadline=None, max_examples=100)
    @given(
        st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(lambda cut: text[slice(*cut)])
        | st.lists(st.integers(0, len(tokenizer) - 1) | st.integers(0, 260), max_size=12)
    )
    def check(ids):
        pieces = token_texts(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    check()


def test_the_name_of_a_tokenizer_may_have_a_revision(tmp_path, monkeypatch):
    hub = CachedModel(tmp_path, monkeypatch)
    for branch, commit in (("main", FIRST), ("v2", SECOND)):
        tokenizer = character_tokenizer()
        tokenizer.chat_template = branch
        hub.add(commit, tokenizer, AutoConfig.for_model("qwen2"))
        hub.move(branch, commit)
    templates = [load_tokenizer(f"user/model{at}").chat_template for at in ("", "@v2", f"@{FIRST}")]
    assert templates == ["main", "v2", "main"]


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "llama"])
def test_a_folder_without_tokenizer_is_refused(tmp_path, model_type):
    """Of some configurations alone `transformers` makes a tokenizer that knows no text, and turns all into nothing."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="it holds no tokenizer, or one that needs the package"):
        load_tokenizer(str(tmp_path))
