"""How sure a mean is, against the normal approximation and by drawing naively."""

import math

import numpy as np
import pytest

from lightning_sft.generation.bootstrap import bootstrap_mean

RNG = np.random.default_rng(3)


@pytest.mark.parametrize(
    "values",
    [RNG.choice([-1.0, 0.0, 1.0], p=[0.1, 0.5, 0.4], size=4000), RNG.uniform(-1.0, 2.0, size=1000)],
    ids=["three values", "all different"],
)
def test_of_many_values_the_interval_is_that_of_the_normal_approximation(values):
    half = 1.959964 * values.std() / math.sqrt(len(values))
    expected = values.mean() - half, values.mean() + half
    found = bootstrap_mean(values.tolist())
    assert found == pytest.approx(expected, abs=0.06 * half)


def test_the_same_values_give_the_same_interval_and_other_random_numbers_are_left_alone():
    values, before = [0.0, 1.0, 1.0] * 9 + [3.0], np.random.get_state()[1].tolist()
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert np.random.get_state()[1].tolist() == before


def test_values_that_are_all_the_same_leave_no_doubt_and_none_leave_everything_open():
    assert bootstrap_mean([0.0] * 50) == (0.0, 0.0)
    assert bootstrap_mean([0.7]) == (0.7, 0.7)
    assert all(map(math.isnan, bootstrap_mean([])))
