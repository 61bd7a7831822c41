"""The tokens that end a response, when one is generated and in the configurations of an exported model."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.chat.chat_encoding import end_of_turn_id


def end_ids(own: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: those that the model names itself, and those that it has learnt from its data.

    Learnt are the tokenizer's EOS, and the token with which its chat template ends a turn. They can differ: a base
    model that is taught conversations names EOS alone, and would go on after the end of its turn. The model's own, the
    `eos_token_id` of its configuration, come first.
    """
    named = own if isinstance(own, Sequence) else [own]
    ids = [*named, tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))
