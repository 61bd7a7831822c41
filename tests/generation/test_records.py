"""What records add up to, and how they are kept."""

import json
import math
import random
from itertools import combinations

import pytest

from lightning_sft.generation.records import GenerationRecord, summarize, summarize_test, write_records


def record(answer, index=0, length=4, entropy=0.5, sample=0):
    reward = None if answer is None else answer / 2
    return GenerationRecord("p", "r", "g", 1.0, answer, reward, entropy, length, "eos", None, index, sample)


def test_the_summary_divides_lengths_by_correctness():
    records = [record(1.0, 0, 10, 0.5), record(0.0, 1, 4, 1.5), record(0.0, 2, 7, 4.0)]
    assert summarize(records) == pytest.approx(
        {
            "reward": 1 / 6,
            "answer_reward": 1 / 3,
            "format_reward": 1.0,
            "response_length": 7.0,
            "response_length_correct": 10.0,
            "response_length_incorrect": 5.5,
            "response_entropy": 2.0,
            "reward_failures": 0.0,
        }
    )


def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_response():
    rng = random.Random(0)
    answers = [[float(rng.random() < chance) for _ in range(6)] for chance in (0.0, 0.2, 0.5, 0.9, 1.0)]
    records = [record(answer, i, sample=k) for i, group in enumerate(answers) for k, answer in enumerate(group)]
    rng.shuffle(records)
    found = {name: value for name, value in summarize(records).items() if name.startswith("pass")}

    def naive(k):
        draws = [[any(draw) for draw in combinations(group, k)] for group in answers]
        return sum(sum(each) / len(each) for each in draws) / len(draws)

    assert found == pytest.approx({f"pass_at_{k}": naive(k) for k in (1, 2, 4, 6)})
    assert not any(name.startswith("pass") for name in summarize(records[1:]))  # not of one prompt less than of others


def bootstrap_interval(records):
    summary = summarize_test(records)
    return summary["answer_reward_low"], summary["answer_reward_high"]


def test_the_bootstrap_interval_is_that_of_drawing_prompts_with_replacement():
    rng = random.Random(1)
    answers = [float(rng.random() < 0.3) for _ in range(60)]
    means = sorted(sum(rng.choices(answers, k=60)) / 60 for _ in range(20_000))
    expected = means[500], means[-500]
    once = [record(answer, index) for index, answer in enumerate(answers)]
    assert bootstrap_interval(once) == pytest.approx(expected, abs=0.02)
    # The same response sixteen times over is no more evidence than once.
    again = [record(answer, index, sample=k) for index, answer in enumerate(answers) for k in range(16)]
    assert bootstrap_interval(again) == bootstrap_interval(once)
    assert bootstrap_interval([record(1.0)]) == (1.0, 1.0)
    assert all(map(math.isnan, bootstrap_interval([record(None)])))


def test_records_are_written_one_json_object_a_line(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    first, second = record(1.0), record(0.0, entropy=math.nan)
    first.prompt, second.prompt = "a\nb", "\u00fc\u2028"
    first.tokens, first.token_ids = ["r", "<eos>"], [7, 1]
    first.token_log_probs, first.token_entropies = [-0.123456, -math.inf], [0.1, 2.0]
    write_records(path, [first], step=3)
    write_records(path, [second], "a", step=3)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    rounded = {"token_log_probs": [-0.1235, None], "token_entropies": [0.1, 2.0]}
    assert lines[0] == {"step": 3} | vars(first) | rounded
    assert lines[1] == {"step": 3} | vars(second) | {"token_entropy": None}


def test_half_of_a_character_in_the_message_of_a_failed_reward_is_written_and_read_back(tmp_path):
    failed = record(0.0)
    failed.reward_error = "ValueError: \ud83d"
    write_records(tmp_path / "a.jsonl", [failed])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["reward_error"] == "ValueError: \ud83d"
