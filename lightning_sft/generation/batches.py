"""Which responses are generated together."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.checks import check_type
from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.data.tokens.texts import check_is_text
from lightning_sft.data.tokens.tokenization import encode_prompts
from lightning_sft.errors import SettingsError, SettingsTypeError
from lightning_sft.generation.responses import ResponseRequest
from lightning_sft.generation.sampling import Sampling
from lightning_sft.model.modes import evaluating
from lightning_sft.model.positions import num_positions
from lightning_sft.model.sharding import is_sharded


def make_requests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], sampling: Sampling
) -> list[ResponseRequest]:
    """A request for each sample of each prompt.

    Refused are prompts and ground truths that are no text, such as a lone surrogate, which cannot be encoded, and
    tokens for which the model has no embedding.
    """
    for prompt in prompts:
        subject, expected = f"ground_truths[{prompt.index}]", "a string, or none if the response is not to be scored"
        check_type(subject, prompt.ground_truth, str, expected, optional=True)
        check_is_text(f"`{subject}`", prompt.ground_truth or "")
    if not callable(getattr(model, "get_input_embeddings", None)):
        raise SettingsTypeError(
            f"`model` is of type {type(model).__name__}, expected a causal language model of `transformers`. Give what "
            "the wrapper holds, such as its `module` or `model`."
        )
    texts, as_written = [prompt.text for prompt in prompts], [prompt.as_written for prompt in prompts]
    encoded = encode_prompts(texts, tokenizer, as_written=as_written)
    num_embeddings, highest = len(_embeddings(model)), max((max(ids) for ids in encoded if ids), default=0)
    if highest >= num_embeddings:  # a CUDA device would only say that an assertion has failed
        raise SettingsError(
            f"A prompt has the token id {highest}, but the model has only {num_embeddings} embeddings. Give the "
            "model's own tokenizer."
        )
    positions = num_positions(model)
    return [
        ResponseRequest(
            prompt,
            sample,
            ids,
            _max_new_tokens(positions, len(ids), sampling.max_new_tokens),
            sampling.seed_of(prompt.index, sample),
        )
        for prompt, ids in zip(prompts, encoded, strict=True)
        for sample in range(sampling.num_samples)
    ]


def _max_new_tokens(positions: int | None, num_prompt_tokens: int, wanted: int) -> int:
    """Tokens that a response may have: fewer than wanted where the model runs out of positions.

    Room for more than 32 is then rounded down to a multiple of 32, so that prompts can still share a batch.
    """
    if not num_prompt_tokens:  # nothing to continue
        return 0
    if positions is None or num_prompt_tokens + wanted <= positions:
        return wanted
    room = max(positions - num_prompt_tokens, 0)
    return room if room < 32 else room // 32 * 32


def make_batches(
    requests: Sequence[ResponseRequest], max_tokens: int, world_size: int
) -> Iterator[list[ResponseRequest]]:
    """Batches over all devices, for each to take every `world_size`-th request of.

    Requests of a batch have the same `max_new_tokens`, so that no response is cut short by its neighbours, and prompts
    of similar length. One without room for a response is in no batch. On each device a batch has at most `max_tokens`:
    its rows times the longest prompt and response.
    """
    batch: list[ResponseRequest] = []
    for request in sorted(requests, key=lambda request: (request.max_new_tokens, len(request.prompt_ids))):
        num_rows = len(batch) // world_size + 1
        full = num_rows * (len(request.prompt_ids) + request.max_new_tokens) > max_tokens
        if batch and (full or request.max_new_tokens != batch[0].max_new_tokens):
            yield batch
            batch = []
        if request.max_new_tokens:
            batch.append(request)
    if batch:
        yield batch


def tokens_per_batch(model: PreTrainedModel, requests: Sequence[ResponseRequest]) -> int:
    """The most tokens of a batch if nobody says how many.

    A pass over a batch adds one token to each of its responses. On a CUDA device it takes hardly longer for many than
    for few, so there are as many as have their keys and values, and the logits of that token, in a sixteenth of its
    memory. Of short requests there are more in a batch, each with its logits. A CPU gains nothing by it, and a sharded
    model scores all of a batch in one pass.
    """
    if model.device.type != "cuda" or is_sharded(model) or (size := _cache_bytes_per_token(model)) is None:
        return 32_768
    shortest = min((len(each.prompt_ids) + each.max_new_tokens for each in requests if each.max_new_tokens), default=1)
    logits = 4 * len(_embeddings(model))  # of a row, in float32
    memory: int = torch.cuda.get_device_properties(model.device).total_memory
    return memory // 16 // (size + logits // shortest)


def _embeddings(model: PreTrainedModel) -> torch.Tensor:
    return cast(nn.Embedding, model.get_input_embeddings()).weight


def _cache_bytes_per_token(model: PreTrainedModel) -> int | None:
    """Of keys and values in all layers, as a pass over one token leaves them; None if it leaves something else.

    Configurations do not tell: models share keys and values, compress them, or have them in some layers alone. Some
    keep a state of each sequence, whatever its length, and can have far fewer of them in the same memory.
    """
    if model._is_stateful:
        return None
    token = torch.zeros((1, 1), dtype=torch.int64, device=_embeddings(model).device)
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        output = cast(Any, model)(token, use_cache=True)
    cache = getattr(output, "cache", None) or getattr(output, "past_key_values", None)
    layers = getattr(cache, "layers", [])
    if not all(hasattr(layer, "keys") for layer in layers):
        return None
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) or None
