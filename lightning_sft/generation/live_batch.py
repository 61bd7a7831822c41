"""`LiveBatch`: the responses of a batch that have not ended yet; those that end leave it, and the others go on."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lightning_sft.model.sharding import is_sharded

_FEWEST = 4  # responses that have to end before `generate` is called anew for the others


class LiveBatch:
    """What `generate` takes and returns of a batch.

    To `generate` a response that has ended stays in the batch until all have, and costs as much as one that has not. So
    it is interrupted when a quarter of the batch has ended, and goes on with the others and their cache. Prompts are
    padded on the left.

    Attributes:
        rows: Places of the live responses among the prompts.
        prompt_width: Columns before the first generated token.
        input_ids: Prompts and what has been generated, `(len(rows), prompt_width + num_generated)`.
        attention_mask: 0 where there is padding, of the same shape.
        cache: The keys and values of these tokens, as an argument of `generate`. Empty for models that remember them in
            another way: there all responses stay to the end.
    """

    def __init__(self, prompts: Sequence[list[int]], pad_id: int, model: PreTrainedModel) -> None:
        self.rows = list(range(len(prompts)))
        self.prompt_width = max(map(len, prompts))
        padding = [self.prompt_width - len(prompt) for prompt in prompts]
        padded = [[pad_id] * pads + prompt for pads, prompt in zip(padding, prompts, strict=True)]
        self.input_ids = torch.tensor(padded, device=model.device)
        held = [[0] * pads + [1] * (self.prompt_width - pads) for pads in padding]
        self.attention_mask = torch.tensor(held, device=model.device)
        self.cache = {} if is_sharded(model) else _empty_cache(model)  # sharded, all processes run as many passes

    @property
    def num_generated(self) -> int:
        """Tokens that each live response has."""
        return self.input_ids.shape[1] - self.prompt_width

    def keep(self, places: Sequence[int], sequences: Tensor) -> None:
        """Go on with the rows at some places; `sequences` has a token of these rows in every column."""
        self.rows = [self.rows[place] for place in places]
        kept = torch.tensor(places, dtype=torch.long, device=sequences.device)
        self.input_ids, mask = sequences[kept], self.attention_mask[kept]
        num_new = self.input_ids.shape[1] - mask.shape[1]
        self.attention_mask = torch.cat([mask, mask.new_ones(len(places), num_new)], dim=1)
        for cache in self.cache.values():
            cast(Any, cache).reorder_cache(kept)


def _empty_cache(model: PreTrainedModel) -> dict[str, Cache]:
    """By the name that the model has for it; nothing if it remembers more than keys and values."""
    taken = inspect.signature(model.forward).parameters
    names = [name for name in ("cache", "past_key_values") if name in taken]  # the second in earlier `transformers`
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return dict.fromkeys(names[:1], cache)
    return {}


class ResponseEnds(StoppingCriteria):
    """Notes where each response ends, by an EOS or a stop string, and interrupts `generate` once enough of them have.

    Attributes:
        lengths: Tokens of the responses that have ended, 0 for the others, `(batch_size,)`.
    """

    def __init__(
        self, batch: LiveBatch, eos_ids: Sequence[int], stop_strings: list[str], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.lengths = batch.input_ids.new_zeros(len(batch.rows))
        self._prompt_width = batch.prompt_width
        self._eos_ids = self.lengths.new_tensor(eos_ids)
        self._stops = StopStringCriteria(tokenizer, stop_strings) if stop_strings else None
        self._enough = max(_FEWEST, len(batch.rows) // 4) if batch.cache else len(batch.rows)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each response is to be stopped, `(batch_size,)`."""
        ended = torch.isin(input_ids[:, -1], self._eos_ids)
        generated = input_ids[:, self._prompt_width :]  # a stop string does not begin in the prompt
        if self._stops is not None:
            ended = ended | self._stops(generated, scores)
        self.lengths = torch.where((self.lengths == 0) & ended, generated.shape[1], self.lengths)
        have_ended = self.lengths > 0
        return have_ended | (have_ended.sum() >= self._enough)
