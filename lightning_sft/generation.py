"""Prompts in, records out: responses with their rewards, entropies and lengths."""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_sft.log_probs import get_response_log_probs
from lightning_sft.losses import masked_normalize
from lightning_sft.messages import check_integers, check_type, shorten
from lightning_sft.rewards import checked_reward, r1_zero_reward
from lightning_sft.sharding import is_sharded
from lightning_sft.time_limit import TimeLimitError, call_within
from lightning_sft.tokenization import Example, collate_padded, encode_prompts, pad_token_id

RewardFn = Callable[[str, str], dict[str, float]]
REWARD_SECONDS = 30.0


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_new_tokens: Most tokens of a response.
        temperature: 0: greedy.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from this many most likely tokens; 0: from all.
        stop_strings: A response ends after the first of these texts, as after EOS.
        seed: Of the samples; training never sees it.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or a stop string is empty.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(max_new_tokens=self.max_new_tokens, top_k=self.top_k, seed=self.seed)
        for name in ("temperature", "top_p"):
            check_type(name, getattr(self, name), Real, "a number")
        if self.stop_strings is not None:
            check_type("stop_strings", self.stop_strings, list, "a list of texts")
            for text in self.stop_strings:
                if not isinstance(text, str) or not text:
                    raise ValueError(f"`stop_strings` has {shorten(text)}, expected texts of at least one character.")
        for name, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2 to the power of 63"),
        ):
            if not fits:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected {expected}.")


@dataclass
class GenerationRecord:
    """One prompt and what the model made of it.

    Args:
        prompt: The text the model was given.
        response: The text it generated, without EOS.
        ground_truth: The reference answer, if there is one.
        format_reward: Whether the response has the wanted form. None without ground truth.
        answer_reward: Whether its answer is right. None without ground truth.
        reward: The total. None without ground truth.
        token_entropy: Mean entropy of the next-token distribution over the response, in nats.
        response_length: Tokens generated, EOS included.
        stop_reason: `eos`, `stop` (a stop string), `length` (also where a prompt leaves the model no room), or
            `empty prompt` (without a single token there is nothing to continue).
        reward_error: What the reward function raised, or that it took too long; its rewards then count as 0.
    """

    prompt: str
    response: str
    ground_truth: str | None
    format_reward: float | None
    answer_reward: float | None
    reward: float | None
    token_entropy: float
    response_length: int
    stop_reason: str
    reward_error: str | None = None


def summarize(records: Sequence[GenerationRecord]) -> dict[str, float]:
    """Averages over records; a mean over nothing is NaN.

    Returns:
        `reward`, `answer_reward`, `format_reward`, `response_length`, `response_length_correct` and
        `response_length_incorrect` (of responses whose `answer_reward` is positive, or not), `response_entropy`
        (nats, mean of the records' means), and `reward_failures`, a count.
    """
    scored = [record for record in records if record.answer_reward is not None]
    correct = [record for record in scored if (record.answer_reward or 0.0) > 0]
    incorrect = [record for record in scored if not (record.answer_reward or 0.0) > 0]

    def mean(group: Sequence[GenerationRecord], name: str) -> float:
        return sum(getattr(record, name) for record in group) / len(group) if group else math.nan

    return {
        "reward": mean(scored, "reward"),
        "answer_reward": mean(scored, "answer_reward"),
        "format_reward": mean(scored, "format_reward"),
        "response_length": mean(records, "response_length"),
        "response_length_correct": mean(correct, "response_length"),
        "response_length_incorrect": mean(incorrect, "response_length"),
        "response_entropy": mean(records, "token_entropy"),
        "reward_failures": float(sum(record.reward_error is not None for record in records)),
    }


def write_records(path: Path, records: Sequence[GenerationRecord], **fields: object) -> None:
    """Write one JSON object a line; `fields` come first in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(fields | asdict(record), ensure_ascii=False) + "\n")


def log_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    ground_truths: Sequence[str | None],
    reward_fn: RewardFn = r1_zero_reward,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    reward_seconds: float | None = REWARD_SECONDS,
    path: str | Path | None = None,
) -> tuple[list[GenerationRecord], dict[str, float]]:
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
        batch_size: Prompts generated for at a time.
        reward_seconds: The most that the reward function may take for one response. None: no limit.
        path: Also write the records there, one JSON object a line.

    Returns:
        The records, in the order of the prompts, and their `summarize`.

    Raises:
        TypeError: If prompts are no list of strings.
        ValueError: If prompts and ground truths do not pair up, `batch_size` is not positive, or there can be no file
            at `path`.

    Source: Stanford CS336, assignment 5, "Logging generations".
    """
    if len(prompts) != len(ground_truths):
        raise ValueError(f"There are {len(prompts)} `prompts`, but {len(ground_truths)} `ground_truths`.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, expected at least 1.")
    if path is not None:
        _make_folder(Path(path))
    sampling = sampling or Sampling()
    prompt_ids, pad_id = encode_prompts(prompts, tokenizer), pad_token_id(tokenizer)
    limits = [_limit(model, len(ids), sampling.max_new_tokens) for ids in prompt_ids]
    # A prompt without tokens, or without room after it, gets no response.
    responses: list[tuple[list[int], str]] = [([], "length" if ids else "empty prompt") for ids in prompt_ids]
    entropies = [0.0] * len(prompts)
    with _evaluating(model), _own_seed(model, sampling.seed):
        for indices in _as_many_as_others(list(_batches(prompt_ids, limits, batch_size)), model):
            batch = [prompt_ids[index] for index in indices] or [[pad_id]]  # nothing to do but to take part
            limit = limits[indices[0]] if indices else 1
            generated = _generate(model, tokenizer, batch, sampling, limit)
            means = _mean_entropies(model, batch, [ids for ids, _ in generated], pad_id)
            for index, pair, entropy in zip(indices, generated, means, strict=bool(indices)):
                responses[index], entropies[index] = pair, entropy
    ordered = []
    for index, (ids, stop_reason) in enumerate(responses):
        without_eos = ids[:-1] if stop_reason == "eos" else ids
        response = str(tokenizer.decode(without_eos, skip_special_tokens=False))
        rewards, error = _score(reward_fn, response, ground_truths[index], reward_seconds)
        ordered.append(
            GenerationRecord(
                prompt=prompts[index],
                response=response,
                ground_truth=ground_truths[index],
                **rewards,
                token_entropy=entropies[index],
                response_length=len(ids),
                stop_reason=stop_reason,
                reward_error=error,
            )
        )
    if path is not None:
        write_records(Path(path), ordered)
    return ordered, summarize(ordered)


def _make_folder(path: Path) -> None:
    """Now rather than after generating."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`path` is {str(path)!r}, whose folder cannot be made: {error.strerror}.") from error


def _limit(model: PreTrainedModel, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Tokens that a response may have: fewer than wanted where the model runs out of positions.

    Room for more than 32 is then rounded down to a multiple of 32, so that prompts can still share a batch.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if not num_prompt_tokens or positions is None or num_prompt_tokens + max_new_tokens <= positions:
        return max_new_tokens if num_prompt_tokens else 0
    room = positions - num_prompt_tokens
    return room if room < 32 else room // 32 * 32


def _batches(prompt_ids: list[list[int]], limits: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts that share a limit, so that none is cut short by its neighbours; similar lengths together."""
    order = sorted(range(len(limits)), key=lambda index: (limits[index], len(prompt_ids[index])))
    for limit, group in groupby(order, key=limits.__getitem__):
        indices = list(group) if limit > 0 else []
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def _as_many_as_others(batches: list[list[int]], model: PreTrainedModel) -> list[list[int]]:
    """Where processes share a model's weights, all run it equally often: those with fewer batches get empty ones."""
    if not is_sharded(model):
        return batches
    most = torch.tensor(len(batches), device=model.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return batches + [[] for _ in range(int(most) - len(batches))]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _own_seed(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Draw from this seed; afterwards the random state is back where it was."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
) -> list[tuple[list[int], str]]:
    """Each prompt's response ids, ending in EOS where the model stopped by itself, and why it ended."""
    width, pad_id = max(len(prompt) for prompt in prompts), pad_token_id(tokenizer)
    input_ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    eos_ids = _eos_ids(model, tokenizer)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        use_cache=True,
        num_beams=1,
        repetition_penalty=1.0,  # the model's own recommendation would otherwise apply
        stop_strings=sampling.stop_strings,
        **(drawn if sampling.temperature > 0 else {}),
    )
    stopping = {"tokenizer": tokenizer} if sampling.stop_strings else {}
    with torch.compiler.set_stance("force_eager"):  # a model compiled for training would compile anew for every cache
        output = cast(Any, model).generate(input_ids, attention_mask=mask, generation_config=config, **stopping)
    return [_cut(ids, eos_ids, tokenizer, sampling.stop_strings or []) for ids in output[:, width:].tolist()]


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
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


def _mean_entropies(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]], pad_id: int
) -> list[float]:
    """Mean entropy over each response, in nats, from one forward pass over prompt and response."""
    pairs = zip(prompts, responses, strict=True)
    batch = collate_padded([Example(input_ids=a + b, num_prompt_tokens=len(a)) for a, b in pairs], pad_id)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    scores = get_response_log_probs(
        model, batch["input_ids"], batch["labels"], return_token_entropy=True, use_cache=False
    )
    sums: Tensor = masked_normalize(scores["token_entropy"], batch["response_mask"], 1.0, dim=-1)
    return (sums / batch["response_mask"].sum(dim=-1)).tolist()


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
