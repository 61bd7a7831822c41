"""`exact_match_reward`: characters that are the same, and others that only look it."""

import pytest
from support.rewards import NO_FORMAT, RIGHT, WRONG, brief

from lightning_sft.rewards.functions import exact_match_reward

# Response, ground truth, rewards.
EXACT_MATCH = [
    # The same.
    ("14", "14", RIGHT),
    ("New York", "New York", RIGHT),
    ("</think> <answer> 14 </answer>", "</think> <answer> 14 </answer>", RIGHT),
    ("\u7b54\u6848 \U0001f600", "\u7b54\u6848 \U0001f600", RIGHT),
    ("\x00", "\x00", RIGHT),
    ("\ud800", "\ud800", RIGHT),
    ("x" * 1_000_000, "x" * 1_000_000, RIGHT),
    # Whitespace around.
    (" 14\n", "14 ", RIGHT),
    ("\r\n14\x0b\x0c", " 14", RIGHT),
    ("\u00a0\u300014\u2028", "14", RIGHT),
    ("\n one\n two\n", "one\n two", RIGHT),
    # What looks like whitespace, but is none.
    ("\u200b14", "14", WRONG),
    ("\ufeff14", "14", WRONG),
    # Whitespace inside.
    ("New  York", "New York", WRONG),
    ("New\u00a0York", "New York", WRONG),
    ("one\r\ntwo", "one\ntwo", WRONG),
    ("1 4", "14", WRONG),
    # Case, and other spellings of the same value.
    ("Paris", "paris", WRONG),
    ("stra\u00dfe", "strasse", WRONG),
    ("14.0", "14", WRONG),
    ("1,234", "1234", WRONG),
    ("\N{MINUS SIGN}14", "-14", WRONG),
    ("\uff11\uff14", "14", WRONG),
    ("$14$", "14", WRONG),
    ("14", r"\boxed{14}", WRONG),
    # More than the answer, or less.
    ("The answer is 14", "14", WRONG),
    ("13 or 14", "14", WRONG),
    ("1", "14", WRONG),
    ("x" * 999_999 + "y", "x" * 1_000_000, WRONG),
    # Characters that look alike.
    ("cafe\u0301", "caf\u00e9", WRONG),
    ("\u0410", "A", WRONG),
    # Nothing.
    ("", "14", NO_FORMAT),
    ("", "", NO_FORMAT),
    ("\u00a0\u3000\n", "14", NO_FORMAT),
    ("\u200b", "14", WRONG),
    ("14", " \n", WRONG),
]


@pytest.mark.parametrize(("response", "ground_truth", "expected"), EXACT_MATCH, ids=brief)
def test_exact_match_compares_every_character_but_the_whitespace_around(response, ground_truth, expected):
    assert exact_match_reward(response, ground_truth) == expected
