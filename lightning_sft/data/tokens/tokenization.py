"""From strings to token ids: prompt and output are tokenised apart, joined, and the response is marked."""

from collections.abc import Sequence
from itertools import pairwise

from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_sft.data.tokens.collation import collate_padded
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.texts import check_is_text, common_length
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten

_MANY = 8  # texts at a time


def prompt_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text of its own accord, such as a BOS; usually none or one."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded positions: the pad token, or else EOS, or else 0. No mask is ever read off this id."""
    ids: tuple[int | None, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token_id for token_id in ids if token_id is not None), 0)


def encode_prompts(
    prompt_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, as_written: Sequence[bool] | None = None
) -> list[list[int]]:
    """Token ids of each prompt, with the tokenizer's own prefix and without a suffix such as EOS.

    A prompt that already spells the prefix out does not get it twice. `as_written` says for each prompt whether it is
    tokenised as it stands, without the prefix, since a chat template wrote it; by default no prompt is.
    """
    encoded = _encode(prompt_strs, tokenizer, "prompt")
    prefix = prompt_prefix(tokenizer)
    return [
        ids if is_written or ids[: len(prefix)] == prefix else prefix + ids
        for ids, is_written in zip(encoded, as_written or [False] * len(encoded), strict=True)
    ]


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, kind: str) -> list[list[int]]:
    if isinstance(texts, str):
        raise SettingsTypeError(
            f"Expected a list of {kind}s, but got one string, {shorten(texts)}. Put it into a list."
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise SettingsTypeError(
                f"{kind} {index} is {shorten(text)} of type {type(text).__name__}, expected a string."
            )
        check_is_text(f"{kind} {index}", text)
    return token_ids(list(texts), tokenizer)


def encode_examples(
    prompt_strs: Sequence[str],
    output_strs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool = False,
) -> list[Example]:
    """Tokenise prompts and outputs apart and join each pair. The response never gains a BOS.

    An empty prompt is the tokenizer's prefix alone. With `append_eos` each response ends in the tokenizer's EOS; an
    output whose last token is EOS already gets no second one.
    """
    if len(prompt_strs) != len(output_strs):
        raise SettingsError(
            f"`prompt_strs` and `output_strs` must pair up, but there are {len(prompt_strs)} prompts "
            f"and {len(output_strs)} outputs."
        )
    if len(output_strs) == 0:
        return []
    eos = _eos(tokenizer, append_eos)
    prompts = encode_prompts(prompt_strs, tokenizer)
    outputs = _encode(output_strs, tokenizer, "output")
    return [
        Example(input_ids=prompt + output + ([] if output[-1:] == eos else eos), num_prompt_tokens=len(prompt))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, append_eos: bool = False) -> list[Example]:
    """Tokenise texts that are learnt as wholes, but for the tokenizer's own prefix, such as BOS.

    A text that spells the prefix out does not get it twice; `append_eos` is as in `encode_examples`.
    """
    if not texts:
        return []
    eos, num_prefix = _eos(tokenizer, append_eos), len(prompt_prefix(tokenizer))
    return [
        Example(input_ids=ids if eos and ids[num_prefix:][-1:] == eos else ids + eos, num_prompt_tokens=num_prefix)
        for ids in encode_prompts(texts, tokenizer)
    ]


def _eos(tokenizer: PreTrainedTokenizerBase, append_eos: bool) -> list[int]:
    """What ends a response."""
    if not append_eos:
        return []
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            "`append_eos` is True, but the tokenizer has no EOS token. Set `tokenizer.eos_token`, or pass "
            "`append_eos=False` (the model then never learns to stop)."
        )
    return [tokenizer.eos_token_id]


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


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, special tokens included.

    Where a character is made of several tokens, the one that completes it has it whole and those before have "". There
    is one piece for each id; joined they are what `decode_ids` gives.
    """
    ids = [int(token_id) for token_id in ids]
    whole = decode_ids(tokenizer, ids)
    pieces = _streamed(tokenizer, ids)
    if not whole.startswith("".join(pieces)) or not pieces:  # slower, by decoding again from the start for each token
        ends = [0]
        for length in range(1, len(ids) + 1):
            ends.append(max(ends[-1], common_length(whole, decode_ids(tokenizer, ids[:length]))))
        pieces = [whole[start:end] for start, end in pairwise(ends)]
    if pieces:
        pieces[-1] += whole[len("".join(pieces)) :]  # bytes that complete no character
    return pieces


def _streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The pieces as far as complete characters go; none if the tokenizer cannot tell them one by one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    stream = DecodeStream(skip_special_tokens=False)
    try:
        return [stream.step(backend, token_id) or "" for token_id in ids]
    except Exception:  # noqa: BLE001 (its only type)
        # Where byte tokens are no UTF-8, a text's start can change with what follows.
        return []


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Tokenise prompts and outputs separately, join each pair, right-pad, and mark the response.

    The prompt keeps the tokenizer's own prefix (such as BOS); the output gets no special token. The mask is True where
    the *label* is a response token. After a prompt without tokens the first response token is no label.

    Args:
        prompt_strs: The prompts.
        output_strs: The outputs, one for each prompt.
        tokenizer: Any Hugging Face tokenizer, with or without a pad token.

    Returns:
        `input_ids`, `labels` and `response_mask`, each `(batch_size, max(prompt_and_output_lens) - 1)`.

    Raises:
        SettingsTypeError: If either is a single string, or contains anything but strings.
        SettingsError: If there are no pairs, the numbers of prompts and outputs differ, or a text contains a lone
            surrogate.

    Source: Stanford CS336, assignment 5, "SFT helper methods".
    """
    examples = encode_examples(prompt_strs, output_strs, tokenizer)
    if not examples:
        raise SettingsError("`prompt_strs` and `output_strs` are empty; expected at least one pair.")
    batch = collate_padded(examples, pad_token_id(tokenizer))
    return {"input_ids": batch.input_ids, "labels": batch.labels, "response_mask": batch.response_mask}
