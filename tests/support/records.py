"""Records of generations that are made up."""

from collections.abc import Sequence
from typing import Any

from lightning_sft import GenerationRecord


def made_up_record(prompt: str, tokens: str | Sequence[str], answer: float | None, **changes: Any) -> GenerationRecord:
    """A response of these tokens, all alike, in the right format and with the reward of its answer; then `changes`."""
    texts = [tokens] if isinstance(tokens, str) else list(tokens)
    size = len(texts)
    fields = {
        "prompt": prompt,
        "response": "".join(texts),
        "ground_truth": "g",
        "format_reward": None if answer is None else 1.0,
        "answer_reward": answer,
        "reward": answer,
        "token_entropy": 0.5,
        "response_length": size,
        "stop_reason": "stop",
        "token_ids": list(range(size)),
        "tokens": texts,
        "token_log_probs": [-1.0] * size,
        "token_entropies": [1.0] * size,
    }
    return GenerationRecord(**(fields | changes))
