"""`ScoredRow`: what a model makes of the response of one row."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.tokenization import decode_ids, token_texts
from lightning_sft.generation.records import DECIMALS, finite


@dataclass(frozen=True)
class ScoredRow:
    """A row of the data, or one example of a row that becomes several, under a model.

    Args:
        index: Number of the example in its split, from 0.
        location: Where the row comes from, such as `line 3 of train.jsonl`.
        prompt: The text before the first token that is learnt.
        response: The text from there on, EOS included.
        loss: Mean negative log-likelihood of the tokens that are learnt, in nats.
        token_entropy: Mean entropy of the distributions that they are from, in nats.
        accuracy: Share of them that are the model's first choice.
        num_tokens: Tokens of the whole example.
        response_length: Tokens that are learnt.
        token_ids: From the first token that is learnt to the end.
        tokens: Their texts.
        token_log_probs: Log-probability of each in nats; None where a token between two learnt turns is context alone.
        token_entropies: Entropy of the distribution at each in nats, likewise.
    """

    index: int
    location: str
    prompt: str
    response: str
    loss: float
    token_entropy: float
    accuracy: float
    num_tokens: int
    response_length: int
    token_ids: list[int] = field(repr=False)
    tokens: list[str] = field(repr=False)
    token_log_probs: list[float | None] = field(repr=False)
    token_entropies: list[float | None] = field(repr=False)

    @classmethod
    def of(
        cls, index: int, location: str, example: Example, scores: Tensor, tokenizer: PreTrainedTokenizerBase
    ) -> "ScoredRow":
        """Put together what is known of an example.

        `scores` are the log-probability, the entropy, and whether it is the model's first choice, of each label that
        counts in the loss: `(3, num_response_labels)`, in main memory.
        """
        ids = [int(token_id) for token_id in example.input_ids]
        learnt = [label + 1 for start, end in example.response_labels() for label in range(start, end)]
        first = learnt[0] if learnt else len(ids)
        log_probs: list[float | None] = [None] * (len(ids) - first)
        entropies = list(log_probs)
        for place, log_prob, entropy in zip(learnt, *scores[:2].tolist(), strict=True):
            log_probs[place - first], entropies[place - first] = round(log_prob, DECIMALS), round(entropy, DECIMALS)
        mean_log_prob, mean_entropy, accuracy = scores.double().mean(dim=1).tolist() if learnt else (0.0, 0.0, 0.0)
        tokens = token_texts(tokenizer, ids[first:])
        return cls(
            index=index,
            location=location,
            prompt=decode_ids(tokenizer, ids[:first]),
            response="".join(tokens),
            loss=-mean_log_prob,
            token_entropy=mean_entropy,
            accuracy=accuracy,
            num_tokens=len(ids),
            response_length=len(learnt),
            token_ids=ids[first:],
            tokens=tokens,
            token_log_probs=log_probs,
            token_entropies=entropies,
        )

    def to_json(self) -> dict[str, Any]:
        """Its line in a file, None for what is no finite number."""
        return {name: finite(value) for name, value in vars(self).items()}
