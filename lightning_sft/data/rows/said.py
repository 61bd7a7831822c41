"""What rows say: a prompt with an output, a text, a conversation, or tokens; to be learnt, or to be continued.

Everywhere `ground_truth` is the reference answer, None if the row has none, and `unused_columns` are columns of the row
that people mean to be used, and that are not.
"""

from dataclasses import dataclass

from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.tokens.example import Example


@dataclass(frozen=True)
class PlainPrompt:
    """A text that the model goes on from."""

    prompt: str
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainRow:
    """A prompt and the output that is to be learnt; or, without a prompt, a text that is learnt as a whole."""

    prompt: str
    output: str
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()
    is_whole: bool = False


@dataclass(frozen=True)
class ChatRow:
    """A conversation, which the chat template is to write."""

    conversation: Conversation
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenRow:
    """A row that is tokenised already."""

    example: Example
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenPrompt:
    """Tokens that the model goes on from."""

    input_ids: list[int]
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()
