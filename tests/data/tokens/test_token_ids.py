"""Token ids of many texts are those that the tokenizer gives when it is called."""

import pytest
from support.models import character_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_sft.data.tokens.tokenization import token_ids

TEXTS = [
    "",
    "a",
    " two  words\n",
    "<eos>ab<bos>",
    "naïve 漢字 🤖 e\u0301",
    "<|im_start|>user\n</s>",
    "x" * 3000,
    "12,345",
]


@pytest.fixture(params=["characters", "qwen2_tokenizer", "stories260k"])
def tokenizer(request):
    if request.param == "characters":
        return character_tokenizer(bos=True, pad=True)
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared_data") / request.param)


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_ids_are_those_of_a_call_whatever_another_call_has_left_behind(tokenizer, split_special_tokens):
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.split_special_tokens = split_special_tokens
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    tokenizer(["ab", "abc"], padding=True, truncation=True, max_length=2, split_special_tokens=not split_special_tokens)
    assert token_ids(TEXTS, tokenizer) == expected
    assert token_ids(TEXTS[4:5], tokenizer) == expected[4:5]
    assert token_ids([], tokenizer) == []


class Lower(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **kwargs):
        text = text.lower() if isinstance(text, str) else [each.lower() for each in text]
        return super()._encode_plus(text, *args, **kwargs)


def test_a_class_that_changes_texts_is_asked_itself():
    tokenizer = Lower(tokenizer_object=character_tokenizer().backend_tokenizer, unk_token=chr(0))
    assert token_ids(["AB"] * 20, tokenizer) == [[97, 98]] * 20
