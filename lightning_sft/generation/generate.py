"""Prompts in, records out: responses with their rewards, log-probabilities and entropies."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_sft.data.chat_encoding import end_of_turn_id
from lightning_sft.data.collation import collate_padded
from lightning_sft.data.example import Example
from lightning_sft.data.tokenization import encode_prompts, pad_token_id, token_texts
from lightning_sft.errors import SettingsError
from lightning_sft.generation.records import GenerationRecord, GenerationRecords, summarize, write_records
from lightning_sft.generation.sampling import Sampling
from lightning_sft.model.log_probs import get_response_log_probs
from lightning_sft.model.modes import evaluating
from lightning_sft.model.sharding import is_sharded
from lightning_sft.rewards.functions import checked_reward, r1_zero_reward
from lightning_sft.rewards.time_limit import TimeLimitError, call_within

RewardFn = Callable[[str, str], dict[str, float]]
REWARD_SECONDS = 30.0
MAX_TOKENS_PER_BATCH = 32_768


def log_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    ground_truths: Sequence[str | None],
    reward_fn: RewardFn = r1_zero_reward,
    *,
    sampling: Sampling | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    reward_seconds: float | None = REWARD_SECONDS,
    path: str | Path | None = None,
    first_index: int = 0,
    as_written: Sequence[bool] | None = None,
    distributed: bool = False,
    progress: Callable[[float], None] | None = None,
) -> tuple[GenerationRecords, dict[str, float]]:
    """Prompt the model and record, for each example, what came of it.

    Model, tokenizer and random state are left exactly as they were.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer; neither a pad token nor a padding side is needed.
        prompts: The texts to continue.
        ground_truths: The reference answer of each prompt; None: the response is not scored.
        reward_fn: Called with response and ground truth; returns `format_reward`, `answer_reward` and `reward`. One
            that raises, takes too long, or returns something else, scores 0, and the record says why.
        sampling: How responses are drawn; greedy by default.
        max_tokens_per_batch: Prompts of similar length share a batch of at most this many tokens, those that may be
            generated included, on each device: it bounds the memory.
        reward_seconds: The most that the reward function may take for one response. None: no limit.
        path: Also write the records there, one JSON object a line.
        first_index: Number of the first prompt, where these are part of more; samples depend on the numbers.
        as_written: For each prompt, whether it is whole, such as one that a chat template wrote, so that the
            tokenizer's own prefix (BOS) is not put before it.
        distributed: Share the prompts among all processes of the process group; each calls this function with all
            prompts, and gets all records. Only the first writes.
        progress: Called during generation with the share that is done, above 0 and at most 1.

    Returns:
        The records, in the order of the prompts, each prompt's samples together; and their `summarize`.

    Raises:
        TypeError: If prompts are no list of strings.
        ValueError: If prompts and ground truths do not pair up, `max_tokens_per_batch` is not positive, or there can
            be no file at `path`.

    Source: Stanford CS336, assignment 5, "Logging generations".
    """
    if len(prompts) != len(ground_truths):
        raise SettingsError(f"There are {len(prompts)} `prompts`, but {len(ground_truths)} `ground_truths`.")
    if max_tokens_per_batch < 1:
        raise SettingsError(f"`max_tokens_per_batch` is {max_tokens_per_batch}, expected at least 1.")
    if path is not None:
        _make_folder(Path(path))
    sampling = sampling or Sampling()
    together = distributed or is_sharded(model)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    drafts = [
        _Draft(number, sample, ids, _limit(model, len(ids), sampling.max_new_tokens))
        for number, ids in enumerate(encode_prompts(prompts, tokenizer, as_written=as_written), first_index)
        for sample in range(sampling.num_samples)
    ]
    batches = list(_batches(drafts, max_tokens_per_batch, world_size))
    with evaluating(model):
        for done, batch in enumerate(batches):
            share = batch[rank::world_size]
            if share or is_sharded(model):  # whose processes all take part
                _respond(model, tokenizer, share, sampling, _part_of(progress, done, len(batches)))
    own = [draft for draft in drafts if not draft.limit][rank::world_size]
    own += [draft for batch in batches for draft in batch[rank::world_size]]
    records = GenerationRecords()
    for draft in own:
        prompt, ground_truth = prompts[draft.index - first_index], ground_truths[draft.index - first_index]
        records.append(_record(draft, prompt, ground_truth, tokenizer, reward_fn, reward_seconds))
    if together:
        parts = [records] * world_size
        dist.all_gather_object(parts, records)
        records = GenerationRecords(record for part in parts for record in part)
    records.sort(key=lambda record: (record.index, record.sample))
    if path is not None and rank == 0:
        write_records(Path(path), records)
    return records, summarize(records)


@dataclass
class _Draft:
    """A record to be."""

    index: int
    sample: int
    prompt_ids: list[int]
    limit: int  # tokens that the response may have
    ids: list[int] = field(default_factory=list)
    stop_reason: str = "length"
    log_probs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)


def _make_folder(path: Path) -> None:
    """Now rather than after generating."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"`path` is {str(path)!r}, whose folder cannot be made: {error.strerror}.") from error


def _limit(model: PreTrainedModel, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Tokens that a response may have: fewer than wanted where the model runs out of positions.

    Room for more than 32 is then rounded down to a multiple of 32, so that prompts can still share a batch.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if not num_prompt_tokens or positions is None or num_prompt_tokens + max_new_tokens <= positions:
        return max_new_tokens if num_prompt_tokens else 0
    room = max(positions - num_prompt_tokens, 0)
    return room if room < 32 else room // 32 * 32


def _batches(drafts: list[_Draft], max_tokens: int, world_size: int) -> Iterator[list[_Draft]]:
    """Batches over all devices, for each to take every `world_size`-th response of.

    Responses of a batch share a limit, so that none is cut short by its neighbours, and have prompts of similar length.
    Without room for a response there is no batch.
    """
    batch: list[_Draft] = []
    for draft in sorted(drafts, key=lambda draft: (draft.limit, len(draft.prompt_ids))):
        num_rows = len(batch) // world_size + 1
        full = num_rows * (len(draft.prompt_ids) + draft.limit) > max_tokens
        if batch and (full or draft.limit != batch[0].limit):
            yield batch
            batch = []
        if draft.limit:
            batch.append(draft)
    if batch:
        yield batch


def _part_of(progress: Callable[[float], None] | None, done: int, parts: int) -> Callable[[float], None]:
    return lambda share: progress((done + share) / parts) if progress else None


def _respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafts: list[_Draft],
    sampling: Sampling,
    progress: Callable[[float], None],
) -> None:
    """Generate a batch and complete its drafts: tokens, why they ended, and their values."""
    pad_id, prompts = pad_token_id(tokenizer), [draft.prompt_ids for draft in drafts]
    limit = drafts[0].limit if drafts else 1
    rows = [(draft.index, draft.sample) for draft in drafts]
    if not drafts:  # nothing to do but to take part
        prompts, rows = [[pad_id]], [(0, 0)]
    generated = _generate(model, tokenizer, prompts, rows, sampling, limit, progress)
    values = _values(model, prompts, [ids for ids, _ in generated], pad_id)
    for draft, (ids, reason), (log_probs, entropies) in zip(drafts, generated, values, strict=bool(drafts)):
        draft.ids, draft.stop_reason, draft.log_probs, draft.entropies = ids, reason, log_probs, entropies
    progress(1.0)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    rows: list[tuple[int, int]],
    sampling: Sampling,
    max_new_tokens: int,
    progress: Callable[[float], None],
) -> list[tuple[list[int], str]]:
    """Each prompt's response ids, ending in EOS where the model stopped by itself, and why it ended."""
    width, pad_id = max(len(prompt) for prompt in prompts), pad_token_id(tokenizer)
    input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    eos_ids = _eos_ids(model, tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # what is drawn is the only token that the processors leave
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        use_cache=True,
        num_beams=1,
        repetition_penalty=1.0,  # the model's own recommendation would otherwise apply
        stop_strings=sampling.stop_strings,
    )
    stopping = {"tokenizer": tokenizer} if sampling.stop_strings else {}
    with torch.compiler.set_stance("force_eager"):  # a model compiled for training would compile anew for every cache
        output = cast(Any, model).generate(
            input_ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(sampling.processors(rows, width)),
            stopping_criteria=StoppingCriteriaList([_Report(progress, width, max_new_tokens)]),
            **stopping,
        )
    return [_cut(ids, eos_ids, tokenizer, sampling.stop_strings or []) for ids in output[:, width:].tolist()]


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a response ends with: EOS of the model or the tokenizer, or the end of a turn in the chat template."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return sorted({token_id for token_id in ids if token_id is not None})


def _cut(
    ids: list[int], eos_ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_strings: list[str]
) -> tuple[list[int], str]:
    """Drop what was padded on after the end. Whether a response ended is read off its own content."""
    reason = "length"
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
    return ids, reason


class _Report(StoppingCriteria):
    """Stops nothing, but says how far a batch has come."""

    def __init__(self, progress: Callable[[float], None], width: int, max_new_tokens: int) -> None:
        self._progress, self._width, self._max_new_tokens = progress, width, max_new_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self._progress((input_ids.shape[1] - self._width) / self._max_new_tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _values(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], pad_id: int
) -> list[tuple[list[float], list[float]]]:
    """Log-probability and entropy at each response token, in nats, from one forward pass that keeps no logits."""
    pairs = zip(prompts, responses, strict=True)
    batch = collate_padded([Example(input_ids=a + b, num_prompt_tokens=len(a)) for a, b in pairs], pad_id)
    batch = batch.to(model.device)
    mask = batch.response_mask
    scores = get_response_log_probs(model, batch.input_ids, batch.labels, return_token_entropy=True, response_mask=mask)
    rows = zip(scores["log_probs"].cpu(), scores["token_entropy"].cpu(), mask.cpu(), strict=True)
    return [(log_probs[kept].tolist(), entropies[kept].tolist()) for log_probs, entropies, kept in rows]


def _record(
    draft: _Draft,
    prompt: str,
    ground_truth: str | None,
    tokenizer: PreTrainedTokenizerBase,
    reward_fn: RewardFn,
    reward_seconds: float | None,
) -> GenerationRecord:
    without_eos = draft.ids[:-1] if draft.stop_reason == "eos" else draft.ids
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    response = str(tokenizer.decode(without_eos, **plain))
    rewards, error = _score(reward_fn, response, ground_truth, reward_seconds)
    return GenerationRecord(
        prompt=prompt,
        response=response,
        ground_truth=ground_truth,
        **rewards,
        token_entropy=sum(draft.entropies) / max(len(draft.ids), 1),
        response_length=len(draft.ids),
        stop_reason=draft.stop_reason if draft.prompt_ids else "empty prompt",
        reward_error=error,
        index=draft.index,
        sample=draft.sample,
        token_ids=draft.ids,
        tokens=token_texts(tokenizer, draft.ids),
        token_log_probs=draft.log_probs,
        token_entropies=draft.entropies,
    )


def _score(
    reward_fn: RewardFn, response: str, ground_truth: str | None, seconds: float | None
) -> tuple[dict[str, float | None], str | None]:
    names = ("format_reward", "answer_reward", "reward")
    if ground_truth is None:
        return dict.fromkeys(names), None
    try:
        rewards = call_within(seconds, checked_reward, reward_fn, response, ground_truth)
    except TimeLimitError as error:
        return dict.fromkeys(names, 0.0), f"{error}, which is `reward_seconds`"
    except (Exception, SystemExit) as error:  # a user's function must not stop the training
        return dict.fromkeys(names, 0.0), f"{type(error).__name__}: {error}"
    return {name: rewards[name] for name in names}, None
