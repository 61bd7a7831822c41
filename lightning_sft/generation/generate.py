"""Prompts in, records out: responses with their rewards, log-probabilities and entropies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.data.steps.microbatch_cuts import cut_by_cost
from lightning_sft.data.tokens.collation import collate_padded
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.tokenization import pad_token_id, token_texts
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten
from lightning_sft.generation.batches import make_batches, make_requests, tokens_per_batch
from lightning_sft.generation.generators import Responder, ResponseGenerator, make_responder
from lightning_sft.generation.records import GenerationRecord, check_path, summarize, write_records
from lightning_sft.generation.responses import Response, ResponseRequest
from lightning_sft.generation.sampling import Sampling
from lightning_sft.generation.settings import REWARD_SECONDS, GenerationSettings
from lightning_sft.model.log_probs import get_response_log_probs
from lightning_sft.model.modes import evaluating
from lightning_sft.model.sharding import gathered, is_sharded
from lightning_sft.rewards.functions import REWARD_KEYS, RewardFunction, checked_reward, r1_zero_reward
from lightning_sft.rewards.time_limit import TimeLimitError, call_within

_TOKENS_PER_PASS = 8192  # scored at a time: enough to fill a device, and what it computes still fits into caches


def log_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    ground_truths: Sequence[str | None],
    reward_fn: RewardFunction = r1_zero_reward,
    *,
    sampling: Sampling | None = None,
    max_tokens_per_batch: int | None = None,
    reward_seconds: float | None = REWARD_SECONDS,
    path: str | Path | None = None,
    generator: ResponseGenerator | None = None,
    first_index: int = 0,
    as_written: Sequence[bool] | None = None,
    distributed: bool = False,
) -> tuple[list[GenerationRecord], dict[str, float]]:
    """Generate responses to prompts, score them, and record the results for each example.

    Model, tokenizer and random state are left exactly as they were.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer; it needs no pad token and no particular padding side.
        prompts: The texts to continue.
        ground_truths: The reference answer of each prompt; None: the response gets no rewards.
        reward_fn: Called with response and ground truth; returns `format_reward`, `answer_reward` and `reward`. If it
            raises, takes too long, or returns something else, the rewards are 0, and the record says why.
        sampling: How responses are drawn; greedy by default.
        max_tokens_per_batch: Limits the memory: prompts of similar length share a batch of at most this many tokens on
            each device, including those still to be generated. Default: on CUDA as many as have their keys and values,
            and the logits of a forward pass, in a sixteenth of the device's memory; elsewhere, and for models that are
            sharded or have a recurrent state per sequence, 32,768.
        reward_seconds: Time limit of the reward function for one response. None: no limit.
        path: File to write the records to as well, one JSON object per line.
        generator: Function that generates the responses instead of the model, which then computes their
            log-probabilities and entropies. It is called with the model, whose weights it may copy, a `ResponseRequest`
            for each response, and the sampling; it returns a `Response` for each: token ids and a stop reason. On
            several devices each calls its own generator for its share of the prompts.
        first_index: Number of the first prompt, if these are part of a longer list; samples depend on the numbers.
        as_written: For each prompt, whether it is complete, such as one that a chat template formatted, so that the
            tokenizer's own prefix (BOS) is not added.
        distributed: Share the prompts among all processes of the process group; each calls this function with all
            prompts, and gets all records. Only the first writes.

    Returns:
        The records, in the order of the prompts, each prompt's samples together; and averages over them: `reward`,
        `answer_reward`, `format_reward`, `response_length`, `response_length_correct` and `response_length_incorrect`
        (tokens), `response_entropy` (nats), `reward_failures` (a count), and with several samples `pass_at_<k>`. An
        average over nothing is NaN.

    Raises:
        SettingsTypeError: If an argument has the wrong type, or prompts are not a list of strings.
        SettingsError: If the numbers of prompts and ground truths differ, a number is too small, `path` cannot be
            written, or `generator` does not return responses.

    Source: Stanford CS336, assignment 5, "Logging generations".
    """
    for name, texts in {"prompts": prompts, "ground_truths": ground_truths}.items():
        if isinstance(texts, str):  # which would be taken for a list of its characters
            raise SettingsTypeError(f"`{name}` is {shorten(texts)}, expected a list of texts. Put it into a list.")
    as_written = [False] * len(prompts) if as_written is None else as_written
    for name, values in {"ground_truths": ground_truths, "as_written": as_written}.items():
        if len(values) != len(prompts):
            raise SettingsError(f"There are {len(prompts)} `prompts`, but {len(values)} `{name}`. Give one for each.")
    settings = GenerationSettings(reward_fn, sampling or Sampling(), max_tokens_per_batch, reward_seconds, generator)
    path = None if path is None else Path(path).expanduser()
    if path is not None:
        check_path("path", path)
    numbered = [
        Prompt(index, text, ground_truth, is_written)
        for index, (text, ground_truth, is_written) in enumerate(
            zip(prompts, ground_truths, as_written, strict=True), first_index
        )
    ]
    records = generate_records(model, tokenizer, numbered, settings, distributed=distributed)
    if path is not None and _rank_and_world_size(model, distributed)[0] == 0:
        write_records(path, records)
    return records, summarize(records)


def generate_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    distributed: bool = False,
) -> list[GenerationRecord]:
    """`log_generations` for prompts that have their numbers already: records in the order of these numbers."""
    rank, world_size = _rank_and_world_size(model, distributed)
    requests = make_requests(model, tokenizer, prompts, settings.sampling)
    records = [
        _record(request, Response([]), _TokenValues([], []), tokenizer)
        for request in [request for request in requests if not request.max_new_tokens][rank::world_size]
    ]
    # Devices may differ, but the batches are the same for all.
    max_tokens = settings.max_tokens_per_batch or min(gathered(tokens_per_batch(model, requests), world_size))
    shares = [batch[rank::world_size] for batch in make_batches(requests, max_tokens, world_size)]
    with evaluating(model):
        respond = make_responder(model, tokenizer, shares, settings.sampling, settings.generator)
        for share in shares:
            if share or is_sharded(model):  # whose processes all take part
                records += _answer(model, tokenizer, share, respond)
    for record in records:
        _add_rewards(record, settings)
    of_all = [record for part in gathered(records, world_size) for record in part]
    return sorted(of_all, key=lambda record: (record.index, record.sample))


def _rank_and_world_size(model: PreTrainedModel, distributed: bool) -> tuple[int, int]:
    """The number of this process among those that share the prompts, and how many these are."""
    return (dist.get_rank(), dist.get_world_size()) if distributed or is_sharded(model) else (0, 1)


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[ResponseRequest], respond: Responder
) -> list[GenerationRecord]:
    """Records of a batch, without rewards. Without requests the process only takes part in what the others compute."""
    stand_in = ResponseRequest(Prompt(0, "", None), 0, [pad_token_id(tokenizer)], 1)
    responses = respond(requests or [stand_in])
    values = _token_values(model, requests or [stand_in], responses, pad_token_id(tokenizer))
    answered = zip(requests, responses, values, strict=bool(requests))
    return [_record(request, response, each, tokenizer) for request, response, each in answered]


@dataclass(frozen=True)
class _TokenValues:
    """Of each token of a response, in nats."""

    log_probs: list[float]
    entropies: list[float]


def _token_values(
    model: PreTrainedModel, requests: Sequence[ResponseRequest], responses: Sequence[Response], pad_id: int
) -> list[_TokenValues]:
    """Log-probability and entropy at each response token, from forward passes that keep no logits."""
    examples = [
        _example(request.prompt_ids, list(response.token_ids), pad_id)
        for request, response in zip(requests, responses, strict=True)
    ]
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    lengths = [len(examples[place].input_ids) for place in order]
    # Sharded, all processes run as many passes, whatever lengths their responses have.
    cuts = [0, len(order)] if is_sharded(model) else cut_by_cost(lengths, max(_TOKENS_PER_PASS, lengths[0]))
    values: dict[int, _TokenValues] = {}
    for start, end in pairwise(cuts):
        places = order[start:end]
        batch = collate_padded([examples[place] for place in places], pad_id).to(model.device)
        scores = get_response_log_probs(
            model, batch.input_ids, batch.labels, return_token_entropy=True, response_mask=batch.response_mask
        )
        columns = (scores["log_probs"].cpu(), scores["token_entropy"].cpu(), batch.response_mask.cpu())
        for place, log_probs, entropies, kept in zip(places, *columns, strict=True):
            values[place] = _TokenValues(log_probs[kept].tolist(), entropies[kept].tolist())
    return [values[place] for place in range(len(examples))]


def _example(prompt_ids: list[int], response_ids: list[int], pad_id: int) -> Example:
    """A prompt and its response, to be scored; a generator's response may be empty.

    The last token is no input. So a prompt of a single token without a response would be a row of no inputs, which a
    model does not take: padding stands in for the response, as part of the prompt, which is not scored.
    """
    prompt_ids = prompt_ids if response_ids else [*prompt_ids, pad_id]
    return Example(input_ids=prompt_ids + response_ids, num_prompt_tokens=len(prompt_ids))


def _record(
    request: ResponseRequest, response: Response, values: _TokenValues, tokenizer: PreTrainedTokenizerBase
) -> GenerationRecord:
    """The record of a response, without rewards."""
    ids = list(response.token_ids)
    without_eos = ids[:-1] if response.stop_reason == "eos" else ids
    text = tokenizer.decode(without_eos, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return GenerationRecord(
        prompt=request.prompt.text,
        response=str(text),
        ground_truth=request.prompt.ground_truth,
        format_reward=None,
        answer_reward=None,
        reward=None,
        token_entropy=sum(values.entropies) / max(len(ids), 1),
        response_length=len(ids),
        stop_reason=response.stop_reason if request.prompt_ids else "empty prompt",
        index=request.prompt.index,
        sample=request.sample,
        token_ids=ids,
        tokens=token_texts(tokenizer, ids),
        token_log_probs=values.log_probs,
        token_entropies=values.entropies,
    )


def _add_rewards(record: GenerationRecord, settings: GenerationSettings) -> None:
    """Score a response; where the reward function fails, the rewards are 0 and the record says why."""
    if record.ground_truth is None:
        return
    rewards = dict.fromkeys(REWARD_KEYS, 0.0)
    try:
        arguments = (settings.reward_fn, record.response, record.ground_truth)
        rewards = call_within(settings.reward_seconds, checked_reward, *arguments)
    except TimeLimitError as error:
        record.reward_error = f"{error}, which is `reward_seconds`"
    except (Exception, SystemExit) as error:  # noqa: BLE001, a user's function must not stop the training
        record.reward_error = f"{type(error).__name__}: {error}"
    record.format_reward, record.answer_reward, record.reward = (rewards[key] for key in REWARD_KEYS)
