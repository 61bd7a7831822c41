"""How many tokens the beginning of a text has, without tokenising it again and again."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.texts import common_length
from lightning_sft.data.tokens.tokenization import token_ids


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the special tokens of a tokenizer in a text."""
    return re.compile("|".join(map(re.escape, sorted(_special_tokens(tokenizer), key=len, reverse=True))) or r"(?!)")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tokens | set(tokenizer.all_special_tokens)


@dataclass(frozen=True)
class Alike:
    """How many tokens two texts begin with alike, and whether these are all tokens of the second of them."""

    num_tokens: int
    is_whole: bool


class TokenCounter:
    """Tokenises texts, and counts the tokens of their beginnings.

    Special tokens divide a text into parts that are tokenised apart. So of a text's beginning only the part after its
    last special token needs to be tokenised; and in conversations these parts, `assistant` and a line break for
    instance, come again and again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._pattern = special_token_pattern(tokenizer)
        tokens = sorted(_special_tokens(tokenizer))
        self._special_ids = dict(zip(tokens, map(tokenizer.convert_tokens_to_ids, tokens), strict=True))
        self._known: dict[str, list[int]] = {}

    def count(self, text: str, ids: Sequence[int]) -> "CountedText":
        """Where in the token ids of a text its special tokens are."""
        matches = list(self._pattern.finditer(text))
        special_ids = set(self._special_ids.values())
        indices = [index for index, token_id in enumerate(ids) if token_id in special_ids]
        if [ids[index] for index in indices] != [self._special_ids[match.group()] for match in matches]:
            matches, indices = [], []  # not told apart so: beginnings are tokenised whole
        return CountedText(self, text, ids, matches, indices)

    def part(self, text: str) -> list[int]:
        """The token ids of a part of a text, which may come again."""
        if text not in self._known:
            (self._known[text],) = token_ids([text], self._tokenizer)
        return self._known[text]


@dataclass(frozen=True)
class CountedText:
    """A text, its token ids, and the special tokens in both: `matches` in the text, `indices` in the ids."""

    counter: TokenCounter
    text: str
    ids: Sequence[int]
    matches: Sequence[re.Match[str]]
    indices: Sequence[int]

    def ids_of(self, other: str) -> list[int]:
        """The token ids of another text; what both share is not tokenised again."""
        start, index = self._last_shared(other)
        return [*self.ids[:index], *self.counter.part(other[start:])]

    def alike(self, other: str) -> Alike:
        """How far another text, which may go on otherwise, has the same tokens."""
        start, index = self._last_shared(other)
        own = self.counter.part(other[start:])
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, self.ids[index:], strict=False)))
        return Alike(index + shared, shared == len(own))

    def _last_shared(self, other: str) -> tuple[int, int]:
        """Where the last special token that both texts share begins: in the text, and in the token ids."""
        last = bisect_right(self.matches, common_length(self.text, other), key=re.Match.end) - 1
        return (self.matches[last].start(), self.indices[last]) if last >= 0 else (0, 0)
