"""Token ids of many texts, as fast as a tokenizer gives them; and the text of ids."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_MANY = 8


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of texts as `tokenizer(texts, add_special_tokens=False)` gives them."""
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids: list[list[int]]
    if len(texts) >= _MANY and _leaves_texts_to_its_backend(tokenizer):
        # A call also computes where in the text each token stands, which takes a sixth of its time and is not needed.
        tokenizer("a", **options)  # so that the backend neither pads nor truncates, as an earlier call may have wanted
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [each.ids for each in encoded]
    ids = tokenizer(texts, **options)["input_ids"]
    return ids


def _leaves_texts_to_its_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a call does nothing with texts but give them to the backend; some classes change them first."""
    kind = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids, special tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
