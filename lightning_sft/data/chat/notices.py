"""What a user is to know of what is learnt, once for all rows of which it is true."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NoticeKind = Literal["prompt", "token", "end", "reasoning", "call", "context", "empty"]


@dataclass(frozen=True)
class Notice:
    """One thing to know of one turn.

    Attributes:
        kind: What it is about: a generation prompt that is not written before the turn; a token that holds the end of
            the prompt and the beginning of the turn; a turn that ends in no special token; a part of the content,
            such as its reasoning, that the template leaves out; a tool call that it writes, but does not mark; a
            message before the turn that it leaves out; or a response that says nothing.
        example: The texts by which it can be told.
    """

    kind: NoticeKind
    example: str

    @property
    def is_warning(self) -> bool:
        """Whether something is learnt otherwise than the row has it."""
        return self.kind not in ("end", "empty")

    def in_words(self, rows: str) -> str:
        """What a user reads, with the rows that it is true of."""
        return _SENTENCES[self.kind].format(rows=rows, example=self.example)


_WAY_OUT = (
    "add what is missing to the rows (`reasoning_content`), or set `chat_template_kwargs` that prompt without it (for "
    "many models `enable_thinking: false`)."
)
_SENTENCES: Mapping[NoticeKind, str] = {
    "prompt": (
        "in {rows} the chat template's generation prompt holds more than the text before the turn. It prompts with "
        f"{{example}}. The response begins where the two differ. To learn it after the whole prompt, {_WAY_OUT}"
    ),
    "token": (
        "in {rows} one token holds the end of the generation prompt and the beginning of the turn: {example}. The "
        "response begins with it, though a model that is asked for the turn cannot write it. To learn the turn after "
        f"the whole prompt, remove the space with which it begins; or where the prompt opens the reasoning, {_WAY_OUT}"
    ),
    "end": (
        "in {rows} the chat template ends a turn that is learnt without a special token, with {example}. The "
        "tokenizer's EOS ends the turn instead, so that the model learns to stop; `append_eos: false` leaves that out."
    ),
    "reasoning": (
        "in {rows} the chat template leaves out a part of the content of a turn that is learnt, such as its reasoning: "
        "{example}. It is not learnt. To learn it, give a `chat_template` that writes it."
    ),
    "call": (
        "in {rows} the chat template leaves a tool call out of what it marks with `{{% generation %}}`, such as that "
        "of {example}. It is not learnt. To learn it, give a `chat_template` that marks the calls, too."
    ),
    "context": (
        "in {rows} the chat template leaves out a message before a turn that is learnt: {example}. The model learns to "
        "answer without it. To show it to the model, give a `chat_template` that writes it."
    ),
    "empty": (
        "in {rows} the response is empty, such as the one to {example}. The model learns to end at once. A "
        "`row_filter` can leave such rows out."
    ),
}
