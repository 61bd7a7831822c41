"""What rows say, each in one of four forms: a prompt with an output, a text, a conversation, or tokens."""

from dataclasses import dataclass

from lightning_sft.data.chat.conversation import Conversation
from lightning_sft.data.tokens.example import Example


@dataclass(frozen=True)
class PlainPrompt:
    """What a row without messages says to a model.

    Attributes:
        prompt: The text that the model goes on from.
        ground_truth: The reference answer; None if the row has none.
        unused_columns: Columns of the row that people mean to be used, and that are not.
    """

    prompt: str
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainRow:
    """What a row with a prompt and an output says.

    Attributes:
        prompt: The text before the response.
        output: The response, which is to be learnt.
        ground_truth: The reference answer; the output if the row has no other.
        unused_columns: Columns of the row that people mean to be used, and that are not.
    """

    prompt: str
    output: str
    ground_truth: str
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextRow:
    """A text that is learnt as a whole.

    Attributes:
        text: The text.
        ground_truth: The reference answer; None if the row has none.
    """

    text: str
    ground_truth: str | None


@dataclass(frozen=True)
class ChatRow:
    """What a row says that its chat template is to write.

    Attributes:
        conversation: The messages.
        ground_truth: The reference answer; None if the row has none.
        unused_columns: Of a row without messages: columns that people mean to be used, and that are not.
    """

    conversation: Conversation
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenRow:
    """A row that is tokenised already.

    Attributes:
        example: Its tokens, and which are learnt.
        ground_truth: The reference answer; None if the row has none.
        unused_columns: Columns that hold its text, which is not read.
    """

    example: Example
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenPrompt:
    """What a row that is tokenised already says to a model.

    Attributes:
        input_ids: The tokens that the model goes on from.
        ground_truth: The reference answer; None if the row has none.
        unused_columns: Columns that hold its text, which is not read.
    """

    input_ids: list[int]
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()
