"""What a reward function may return."""

import functools

import numpy as np
import pytest
import torch
from support.rewards import NO_FORMAT, RIGHT, WRONG, respond

from lightning_sft.rewards.functions import REWARD_KEYS, checked_reward, exact_match_reward, r1_zero_reward


@pytest.mark.parametrize(
    "numbers",
    [
        (True, False, False),
        (1, 0, 0),
        (np.float32(1), np.int64(0), np.bool_(False)),
        (torch.tensor(1), torch.tensor(0.0), torch.tensor([False])),
    ],
)
def test_checked_reward_makes_floats_of_numbers_and_drops_other_keys(numbers):
    checked = checked_reward(lambda *_: {"note": "ok", **dict(zip(REWARD_KEYS, numbers, strict=True))}, "a", "b")
    assert checked == WRONG
    assert [type(value) for value in checked.values()] == [float] * 3


def test_checked_reward_passes_the_response_first():
    assert checked_reward(r1_zero_reward, respond("7"), "7") == RIGHT
    assert checked_reward(exact_match_reward, "", "7") == NO_FORMAT


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (None, TypeError, r"`length_reward` returned None, a NoneType\. Return a dict with the keys format_reward, "),
        (1.0, TypeError, r"returned 1\.0, a float\."),
        ([1.0, 1.0, 1.0], TypeError, "a list"),
        ({}, ValueError, r"returned \{\}, without format_reward, answer_reward, reward\."),
        ({"reward": 1.0}, ValueError, r"returned \{'reward': 1\.0\}, without format_reward, answer_reward\."),
        ({**RIGHT, "reward": float("nan")}, ValueError, r"where `reward` is nan\. Return .*each a finite number"),
        ({**RIGHT, "answer_reward": float("-inf")}, ValueError, "where `answer_reward` is -inf"),
        ({**RIGHT, "reward": "1"}, TypeError, "where `reward` cannot be made a float"),
        ({**RIGHT, "reward": None}, TypeError, "where `reward` cannot be made a float"),
        ({**RIGHT, "reward": 1j}, TypeError, "where `reward` cannot be made a float"),
        ({**RIGHT, "reward": 10**400}, TypeError, "where `reward` cannot be made a float"),
        ({**RIGHT, "format_reward": torch.ones(2)}, TypeError, "where `format_reward` cannot be made a float"),
        ({**RIGHT, "format_reward": np.ones(2)}, TypeError, "where `format_reward` cannot be made a float"),
    ],
)
def test_checked_reward_names_the_function_what_it_returned_and_what_was_expected(returned, error, words):
    def length_reward(response, ground_truth):
        return returned

    with pytest.raises(error, match=words):
        checked_reward(length_reward, "a", "b")


def test_checked_reward_names_a_function_without_a_name():
    with pytest.raises(TypeError, match=r"functools\.partial.*returned None"):
        checked_reward(functools.partial(lambda *_: None), "a", "b")


def test_checked_reward_lets_the_functions_own_errors_through():
    def divides(response, ground_truth):
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        checked_reward(divides, "a", "b")
