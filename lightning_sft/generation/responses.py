"""From the token ids of prompts to the token ids of responses, and why each ended.

Texts, log-probabilities, entropies and rewards are found elsewhere, from the token ids. So anything else may generate
in the place of `generate_responses` (`generators.py`).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from lightning_sft.data.chat.chat_encoding import end_of_turn_id
from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.data.tokens.tokenization import pad_token_id
from lightning_sft.generation.live_batch import LiveBatch, ResponseEnds
from lightning_sft.generation.sampling import Sampling, SeededDraw
from lightning_sft.model.routing import RoutingRecorder

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class ResponseRequest:
    """A request for one response.

    Args:
        prompt: The prompt to continue.
        sample: Number of the response among those to the same prompt, from 0.
        prompt_ids: The prompt's token ids.
        max_new_tokens: Maximum number of tokens of the response, EOS included. 0: there is no room for any.
        seed: Seed of this response, for a generator that has one for each: below 2 to the power of 31.
    """

    prompt: Prompt
    sample: int
    prompt_ids: list[int]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Response:
    """A generated response.

    Args:
        token_ids: Token ids, ending in EOS if the model stopped by itself.
        stop_reason: `eos`, `stop` (a stop string) or `length`. `stop` from another generator may mean either of the
            first two: the tokens then tell which.
    """

    token_ids: Sequence[int]
    stop_reason: StopReason = "length"


def generate_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[ResponseRequest], sampling: Sampling
) -> list[Response]:
    """Generate a response to each request with the model itself, which is in eval mode.

    There is at least one request, and all have the same `max_new_tokens`, above 0. If the model is sharded, all
    processes call this.
    """
    eos_ids, stop_strings = model_end_ids(model, tokenizer), sampling.stop_strings or []
    pad_id, max_new_tokens = pad_token_id(tokenizer), requests[0].max_new_tokens
    batch = LiveBatch([request.prompt_ids for request in requests], pad_id, model)
    responses: dict[int, Response] = {}
    with (
        torch.compiler.set_stance("force_eager"),  # a model compiled for training would compile anew for every cache
        RoutingRecorder(model),  # a router loss would take the mask of the whole prompt for that of a token
    ):
        while batch.rows:
            ends = ResponseEnds(batch, eos_ids, stop_strings, tokenizer)
            numbers = [(requests[row].prompt.index, requests[row].sample) for row in batch.rows]
            drawing = [SeededDraw(sampling, numbers, batch.prompt_width)] if sampling.temperature > 0 else []
            output = cast(Any, model).generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=_greedy(max_new_tokens - batch.num_generated, eos_ids, pad_id),
                logits_processor=LogitsProcessorList(drawing),
                stopping_criteria=StoppingCriteriaList([ends]),
                **batch.cache,
            )
            live = []
            generated = output[:, batch.prompt_width :].tolist()
            for place, (ids, length) in enumerate(zip(generated, ends.lengths.tolist(), strict=True)):
                response = until_its_end(ids[: length or None], eos_ids, tokenizer, stop_strings)
                if response.stop_reason == "length" and length:
                    response = Response(response.token_ids, "stop")
                elif response.stop_reason == "length" and len(ids) < max_new_tokens:
                    live.append(place)
                responses[batch.rows[place]] = response
            batch.keep(live, output)
    return [responses[row] for row in range(len(requests))]


def _greedy(max_new_tokens: int, eos_ids: list[int], pad_id: int) -> Any:
    return cast(Any, GenerationConfig)(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # what is drawn is the only token that the processors leave
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        use_cache=True,
        num_beams=1,
        repetition_penalty=1.0,  # the model's own recommendation would otherwise apply
    )


def model_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a model's responses, see `end_ids`."""
    return end_ids(getattr(model.generation_config, "eos_token_id", None), tokenizer)


def end_ids(own: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: those that the model names itself, and those that it has learnt from its data.

    Learnt are the tokenizer's EOS, and the token with which its chat template ends a turn. They can differ: a base
    model that is taught conversations names EOS alone, and would go on after the end of its turn. The model's own, the
    `eos_token_id` of its configuration, come first.
    """
    named = own if isinstance(own, Sequence) else [own]
    ids = [*named, tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def until_its_end(
    ids: list[int], eos_ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_strings: list[str]
) -> Response:
    """The response without what follows its end, such as padding. Whether it has ended is read off its own tokens."""
    reason: StopReason = "length"
    for position, token_id in enumerate(ids):
        if token_id in eos_ids:
            ids, reason = ids[: position + 1], "eos"
            break
    if stop_strings:

        def stopped(length: int) -> bool:
            text = tokenizer.decode(ids[:length], skip_special_tokens=False)
            return any(stop in text for stop in stop_strings)

        length = bisect_left(range(len(ids) + 1), True, key=stopped)
        if length <= len(ids):
            ids, reason = ids[:length], "stop"
    return Response(ids, reason)
