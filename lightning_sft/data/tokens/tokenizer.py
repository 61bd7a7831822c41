"""Tokenizers by name or by folder, without code of theirs."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_sft.errors import SettingsError, is_missing_path, one_line


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name or folder.

    Raises:
        ValueError: If there is no such tokenizer, or it brings code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = "there is no such folder." if is_missing_path(name) else one_line(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it brings Python code of its own. If you trust it, load it with `AutoTokenizer.from_pretrained("
                "..., trust_remote_code=True)` and pass the tokenizer itself."
            )
        raise SettingsError(f"`tokenizer` is {name!r}, which cannot be loaded: {reason}") from error
