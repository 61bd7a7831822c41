"""Prompts, sampling and rewards that cannot be used."""

import math
import sys
import time
from collections.abc import Callable

import pytest
from support.models import character_tokenizer, tiny_model
from support.refusals import Refusal, assert_says, each, write
from torch.nn import DataParallel

from lightning_sft import Sampling, log_generations
from lightning_sft.errors import SettingsTypeError


def generate(prompts=("a",), ground_truths=("b",), **options):
    """Two tokens for each prompt."""
    how = {"reward_fn": lambda *_: dict.fromkeys(("format_reward", "answer_reward", "reward"), 0.0)} | options
    sampling = Sampling(max_new_tokens=2)
    return log_generations(tiny_model(), character_tokenizer(), prompts, ground_truths, sampling=sampling, **how)


OTHER_REWARD = "Return a dict with the keys format_reward, answer_reward, reward, each a finite number."

REFUSED = {
    "temperature of NaN": Refusal(
        lambda folder: Sampling(temperature=math.nan), "`temperature` is nan, expected 0 (greedy) or more."
    ),
    "stop_strings of one text": Refusal(
        lambda folder: Sampling(stop_strings="</answer>"),
        "`stop_strings` is '</answer>' of type str, expected a list of texts.",
        SettingsTypeError,
    ),
    "stop_strings of nothing": Refusal(
        lambda folder: Sampling(stop_strings=[""]), "`stop_strings` has '', expected texts of at least one character."
    ),
    "prompts and ground truths of other numbers": Refusal(
        lambda folder: generate(["a", "b"], ["c"]), "There are 2 `prompts`, but 1 `ground_truths`. Give one for each."
    ),
    "another number of `as_written`": Refusal(
        lambda folder: generate(as_written=[True, False]),
        "There are 1 `prompts`, but 2 `as_written`. Give one for each.",
    ),
    "one text as prompts": Refusal(
        lambda folder: generate("ab", ["c", "d"]),
        "`prompts` is 'ab', expected a list of texts. Put it into a list.",
        SettingsTypeError,
    ),
    "a number as ground truth": Refusal(
        lambda folder: generate(ground_truths=[3]),
        "`ground_truths[0]` is 3 of type int, expected a string, or none if the response is not to be scored.",
        SettingsTypeError,
    ),
    "half a character as ground truth": Refusal(
        lambda folder: generate(ground_truths=["\ud800"]),
        "`ground_truths[0]` holds a lone surrogate, which is not text: '\\ud800'.",
    ),
    "a model in a wrapper": Refusal(
        lambda folder: log_generations(DataParallel(tiny_model()), character_tokenizer(), ["a"], ["b"]),
        "`model` is of type DataParallel, expected a causal language model of `transformers`. Give what the wrapper "
        "holds, such as its `module` or `model`.",
        SettingsTypeError,
    ),
    "a tokenizer of another model": Refusal(
        lambda folder: log_generations(tiny_model(vocab_size=100), character_tokenizer(), ["az"], ["b"]),
        "A prompt has the token id 122, but the model has only 100 embeddings. Give the model's own tokenizer.",
    ),
    "a folder as file of records": Refusal(
        lambda folder: generate(path=folder), "`path` is '{tmp}', but that is a folder. Give another file."
    ),
    "records where no folder can be": Refusal(
        lambda folder: generate(path=write(folder / "file", b"") / "records.jsonl"),
        "`path` is '{tmp}/file/records.jsonl', but {tmp}/file is a file. Give another file.",
    ),
}


@each(REFUSED)
def test_what_cannot_be_generated_is_refused(refusal, tmp_path):
    refusal.check(tmp_path)


def hangs(response: str, ground_truth: str) -> dict[str, float]:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def leaves(response: str, ground_truth: str) -> dict[str, float]:
    sys.exit(3)


def rewards_of(**changes: float) -> Callable[[str, str], dict[str, float]]:
    def length_reward(response, ground_truth):
        return {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0} | changes

    return length_reward


@pytest.mark.parametrize(
    ("reward_fn", "expected"),
    [
        (hangs, "it took longer than 0.2 s, which is `reward_seconds`"),
        (lambda response, ground_truth: 1 / 0, "ZeroDivisionError: division by zero"),
        (leaves, "SystemExit: 3"),
        (
            rewards_of(reward=math.nan),
            "ValueError: The reward function `length_reward` returned {...}, where `reward` is nan. " + OTHER_REWARD,
        ),
        (
            rewards_of(answer_reward=math.inf),
            "ValueError: The reward function `length_reward` returned {...}, where `answer_reward` is inf. "
            + OTHER_REWARD,
        ),
        (
            lambda *_: 1.0,
            "TypeError: The reward function `<lambda>` returned 1.0, a float. " + OTHER_REWARD,
        ),
    ],
    ids=["hangs", "raises", "exits", "NaN", "infinite", "no dictionary"],
)
def test_the_record_says_why_a_reward_failed_and_counts_it_as_zero(reward_fn, expected, tmp_path):
    (record,), summary = generate(reward_fn=reward_fn, reward_seconds=0.2)
    assert_says(record.reward_error, expected, tmp_path)
    assert (record.format_reward, record.answer_reward, record.reward) == (0.0, 0.0, 0.0)
    assert summary["reward_failures"] == 1
