"""Tokenizers by name or by folder, without code of theirs."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_sft.checks import check_type
from lightning_sft.errors import SettingsError, is_missing_path, one_line
from lightning_sft.hub import split_revision

_IS_NONE = (
    "it holds no tokenizer, or one that needs the package `sentencepiece` or `tiktoken`. Give the name or folder of "
    "one as `tokenizer`: for adapters, that of their base model."
)


def name_or_tokenizer(tokenizer: object) -> str | PreTrainedTokenizerBase:
    """What the user has given as a tokenizer; a path as a string, without `~`."""
    if tokenizer is None:
        raise SettingsError("`tokenizer` is missing; expected a name, a path or a tokenizer.")
    check_type("tokenizer", tokenizer, (str, Path, PreTrainedTokenizerBase), "a name, a path or a tokenizer")
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else os.path.expanduser(str(tokenizer))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name, perhaps with a revision (`name@revision`), or by folder."""
    repository, revision = split_revision(name)
    options = {} if revision is None else {"revision": revision}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            repository, trust_remote_code=False, **options
        )
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # made of the configuration of a Qwen or GPT-2 alone
            raise ValueError(_IS_NONE)
        return tokenizer
    except Exception as error:
        reason = "there is no such folder." if is_missing_path(repository) else one_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it brings Python code of its own. If you trust it, load it with `AutoTokenizer.from_pretrained("
                "..., trust_remote_code=True)` and pass the tokenizer itself."
            )
        elif "instantiate the backend tokenizer" in str(error):
            reason = _IS_NONE
        raise SettingsError(f"`tokenizer` is {name!r}, which cannot be loaded: {reason}") from error
