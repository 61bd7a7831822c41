"""How responses are drawn: each by random numbers of its own, whatever else is in its batch and on whatever device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from lightning_sft.checks import check_integer, check_number, check_type
from lightning_sft.errors import SettingsError, shorten


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: Maximum number of tokens of a response.
        temperature: Divides the logits. 0: greedy, always the most likely token.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from this many most likely tokens; 0: from all tokens.
        stop_strings: A response ends after the first of these texts that appears, as it does after EOS.
        num_samples: Responses per prompt; more than one needs a temperature.
        seed: Seed of the samples, not of training. The same seed gives the same samples on any number of devices.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        SettingsError: If a number is out of range or has no effect, or a stop string is empty.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: list[str] | None = None
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, at_least=1)
        check_number("temperature", self.temperature, "0 (greedy) or more", lambda value: 0 <= value < math.inf)
        check_number("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        check_integer("top_k", self.top_k, at_least=0)
        check_integer("num_samples", self.num_samples, at_least=1)
        check_integer("seed", self.seed)
        check_number("seed", self.seed, "at least 0 and below 2 to the power of 63", lambda value: 0 <= value < 2**63)
        if self.stop_strings is not None:
            check_type("stop_strings", self.stop_strings, list, "a list of texts")
            for text in self.stop_strings:
                if not isinstance(text, str) or not text:
                    raise SettingsError(
                        f"`stop_strings` has {shorten(text)}, expected texts of at least one character."
                    )
        if self.num_samples > 1 and self.temperature == 0:
            raise SettingsError(
                f"`num_samples` is {self.num_samples} and `temperature` is 0, which draws the same response each "
                "time. Set a `temperature`."
            )
        for name in ("top_p", "top_k"):
            if self.temperature == 0 and (value := getattr(self, name)) != getattr(Sampling, name):
                raise SettingsError(
                    f"`{name}` is {value}, but `temperature` is 0, so the most likely token is always taken. Set a "
                    f"`temperature`, or leave `{name}` out."
                )

    def seed_of(self, index: int, sample: int) -> int:
        """A seed for one response, the same whatever else is generated.

        Args:
            index: Number of the prompt.
            sample: Number of the response among those to the prompt.
        """
        return int(np.random.SeedSequence([self.seed, index, sample]).generate_state(1)[0] >> 1)


class SeededDraw(LogitsProcessor):
    """Leaves only the drawn token, so that greedy decoding takes it.

    `torch.multinomial` draws for a whole batch from one stream, so that a response would depend on its neighbours.
    Here the n-th token of a response falls where the n-th number of a stream seeded by (seed, prompt, sample) meets
    the cumulative probabilities.

    Args:
        sampling: How responses are drawn; its temperature is above 0.
        rows: Number of the prompt and of the sample for each row of the batch.
        prompt_width: Columns before the first generated token.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[tuple[int, int]], prompt_width: int) -> None:
        self._temperature, self._prompt_width = sampling.temperature, prompt_width
        self._narrow: list[LogitsProcessor] = [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        self._narrow += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        streams = [np.random.default_rng([sampling.seed, *row]) for row in rows]
        self._numbers = torch.from_numpy(np.stack([stream.random(sampling.max_new_tokens) for stream in streams]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores, `(batch_size, vocab_size)`, become 0 for the drawn token and minus infinity for all others."""
        scaled = (scores - scores.max(dim=-1, keepdim=True).values) / self._temperature  # never above 0
        for narrow in self._narrow:
            scaled = narrow(input_ids, scaled)
        cumulative = scaled.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        number = self._numbers[:, input_ids.shape[1] - self._prompt_width, None].to(scores.device)
        # The first token whose sum is above the number: one without probability never is.
        drawn = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
        drawn = drawn.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter(-1, drawn, 0.0)
