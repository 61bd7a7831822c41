"""What answers requests: the model itself, or an inference engine, a server or anything else in its place."""

from collections.abc import Callable, Sequence
from typing import cast, get_args

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.errors import SettingsError, SettingsTypeError, shorten
from lightning_sft.generation.responses import (
    Response,
    ResponseRequest,
    StopReason,
    generate_responses,
    model_end_ids,
    until_its_end,
)
from lightning_sft.generation.sampling import Sampling

# Generates in the model's place. It is called with the model, whose present weights it may copy, with the requests, and
# with how responses are drawn. It returns a response to each request, in their order.
ResponseGenerator = Callable[[PreTrainedModel, Sequence[ResponseRequest], Sampling], Sequence[Response]]
# Returns the responses to requests that share a batch.
Responder = Callable[[Sequence[ResponseRequest]], list[Response]]


def make_responder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[ResponseRequest]],
    sampling: Sampling,
    generator: ResponseGenerator | None,
) -> Responder:
    """Make what is then asked for the responses to one batch after another.

    Without a `generator` the model, which is in eval mode, generates a batch when it is asked for. A generator answers
    the requests of all `batches` of this process at once, since an engine makes batches of its own. Its response to any
    other request is empty.
    """
    if generator is None:
        return lambda requests: generate_responses(model, tokenizer, requests, sampling)
    asked = [request for batch in batches for request in batch]
    responses = list(generator(model, asked, sampling)) if asked else []
    if len(responses) != len(asked):
        raise SettingsError(
            f"`generator` returned {len(responses)} responses to {len(asked)} requests. Return one to each, in order."
        )
    end_ids, stop_strings = model_end_ids(model, tokenizer), sampling.stop_strings or []
    num_embeddings = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    answers = {}
    for request, response in zip(asked, responses, strict=True):
        _check(response, request, num_embeddings)
        ended = until_its_end(list(response.token_ids), end_ids, tokenizer, stop_strings)
        if ended.stop_reason == "length" and response.stop_reason != "length":
            ended = Response(ended.token_ids, "stop")  # for a reason that its tokens do not show
        answers[request.prompt.index, request.sample] = ended
    return lambda requests: [answers.get((each.prompt.index, each.sample), Response([])) for each in requests]


def _check(response: object, request: ResponseRequest, num_embeddings: int) -> None:
    """Refuse what is no response to a request."""
    if not isinstance(response, Response):
        raise SettingsTypeError(f"`generator` returned {shorten(response)}, expected a `Response` for each request.")
    if response.stop_reason not in get_args(StopReason):
        raise SettingsError(
            f"`generator` returned a response with the stop reason {shorten(response.stop_reason)}, expected one of "
            f"{', '.join(get_args(StopReason))}."
        )
    if len(response.token_ids) > request.max_new_tokens:
        raise SettingsError(
            f"`generator` returned {len(response.token_ids)} tokens to prompt {request.prompt.index}, which has "
            f"`max_new_tokens` = {request.max_new_tokens}."
        )
    for token_id in response.token_ids:
        if type(token_id) is not int or not 0 <= token_id < num_embeddings:
            raise SettingsError(
                f"`generator` returned the token id {shorten(token_id)}, expected whole numbers below "
                f"{num_embeddings}, the model's number of embeddings. Does it have the model's tokenizer?"
            )
