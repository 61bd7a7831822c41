"""The benchmarks' own arithmetic; what they measure is not for tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import head
import measure
import train
from support.contestants import counts_and_allocates_64_mebibytes, fails

from lightning_sft.model.flops import training_flops

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_contestants_take_turns_and_one_that_fails_leaves_its_error():
    contestants = {"fails": fails, "counts": counts_and_allocates_64_mebibytes}
    arguments = {"number": 3, "shapes": [(64, 16, 32)]}  # of the matrix products that are timed beside them
    rate, results = measure.in_turn(contestants, arguments, rounds=1, dtype="float32")
    assert rate > 0
    assert results["fails"] == {"error": "RuntimeError: on purpose"}
    assert 60 * 2**20 < results["counts"].pop("peak") < 300 * 2**20  # freed again
    assert results["counts"] == {"number": 3, "twice": 6}


def test_useful_arithmetic_by_hand_is_that_of_the_models_own_weights():
    examples = [
        {"input_ids": [0] * 7, "labels": [-100] * 3 + [0] * 4},
        {"input_ids": [0] * 5, "labels": [-100, *[0] * 4]},
    ]
    model = train.build_model(train.Contest(Path(), "small-fp32", "cpu", 0))
    expected = training_flops(model, num_tokens=12, num_response_tokens=8, num_attended=7 * 8 // 2 + 5 * 6 // 2)
    assert train.useful_flops_per_token("small-fp32", examples) * 12 == pytest.approx(expected)


@linux
@pytest.mark.parametrize("name", ["ours, known weights", "ours, any gradient", "full logits"])
def test_heads_are_timed(name):
    result = head.contest(name, rows=9, hidden=4, vocabulary=50, dtype="float32", device="cpu", repeats=1)
    assert result["seconds"] > 0
