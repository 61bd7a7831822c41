"""`numeric_match_reward`: numbers spelled by hand, and any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rewards import NO_FORMAT, RIGHT, WRONG, anything, brief, quickly

from lightning_sft.rewards.functions import numeric_match_reward

# Response, ground truth, rewards.
NUMERIC_MATCH = [
    # One number.
    ("14", "14", RIGHT),
    (" 14\n", "14", RIGHT),
    ("So 7 and 7 make 14.", "14", RIGHT),
    ("It is 14!", "14", RIGHT),
    ("Is it 14?", "14", RIGHT),
    ("14...", "14", RIGHT),
    ("It is ...14", "14", RIGHT),
    ("(14)", "14", RIGHT),
    ('"14"', "14", RIGHT),
    ("**14**", "14", RIGHT),
    ("__14__", "14", RIGHT),
    ("`14`", "14", RIGHT),
    ("#### 14", "14", RIGHT),
    ("####14", "14", RIGHT),
    ("x=14", "14", RIGHT),
    ("Answer:14", "14", RIGHT),
    ("</think> <answer>14</answer>", "14", RIGHT),
    (r"The answer is $\boxed{14}$.", "14", RIGHT),
    (r"\(14\)", "14", RIGHT),
    ("\u7b54\u6848\u662f14\u4e2a\u3002", "14", RIGHT),
    ("15", "14", WRONG),
    ("141", "14", WRONG),
    # Several: the last one.
    ("7 and 7", "14", WRONG),
    ("13 or 14", "14", RIGHT),
    ("14 or 13", "14", WRONG),
    ("13, 14", "14", RIGHT),
    ("[12, 13, 14]", "14", RIGHT),
    ("7 + 7 = 14", "14", RIGHT),
    ("7+7=14", "14", RIGHT),
    ("14 = 7 + 7", "14", WRONG),
    ("14. The end of question 2.", "14", WRONG),
    ("1 234", "1234", WRONG),
    ("$13$$14$", "14", RIGHT),
    # Signs.
    ("-14", "-14", RIGHT),
    ("+14", "14", RIGHT),
    ("\N{MINUS SIGN}14", "-14", RIGHT),
    ("-14", "\N{MINUS SIGN}14", RIGHT),
    ("x=-14", "-14", RIGHT),
    ("(-14)", "-14", RIGHT),
    ("-14", "14", WRONG),
    ("- 14", "-14", WRONG),
    ("7 - 3", "3", RIGHT),
    ("7 -3", "-3", RIGHT),
    ("It is \N{EM DASH} 14", "14", RIGHT),
    ("It is\N{EM DASH}14", "14", RIGHT),
    ("-0", "0", RIGHT),
    # Spellings of a value.
    ("014", "14", RIGHT),
    ("14.0", "14", RIGHT),
    ("14.000000001", "14", WRONG),
    (".5", "0.5", RIGHT),
    ("-.5", "-1/2", RIGHT),
    ("5.", "5", RIGHT),
    ("1,234", "1234", RIGHT),
    ("1,234,567.50", "1234567.5", RIGHT),
    (r"1{,}234", "1,234", RIGHT),
    ("1e5", "100,000", RIGHT),
    ("1.5E-3", "0.0015", RIGHT),
    ("2e+3", "2000", RIGHT),
    ("\uff11\uff14", "14", RIGHT),
    ("\u0661\u0664", "14", RIGHT),
    ("0.30000000000000004", "0.3", WRONG),
    ("9007199254740993", "9007199254740992", WRONG),
    ("1" + "0" * 98 + "1", "1" + "0" * 98 + "2", WRONG),
    ("2/3" + "0" * 98 + "1", "4/6" + "0" * 98 + "1", WRONG),
    # Fractions.
    ("3/4", "0.75", RIGHT),
    ("0.75", "3/4", RIGHT),
    ("6/8", "3/4", RIGHT),
    ("-3/4", "-0.75", RIGHT),
    ("1,000/10", "100", RIGHT),
    ("1/3", "0.333333", WRONG),
    ("0.3333333333333333", "1/3", WRONG),
    ("3 / 4", "4", RIGHT),
    ("1 3/4", "1.75", WRONG),
    ("1 3/4", "3/4", RIGHT),
    (r"\frac{3}{4}", "3/4", WRONG),
    ("3/4/5", "3/4", NO_FORMAT),
    ("1/0", "1", NO_FORMAT),
    ("0/0", "0", NO_FORMAT),
    ("14 or 1/0", "14", RIGHT),
    ("\u00bd", "1/2", NO_FORMAT),
    # Money and percent.
    ("$14", "14", RIGHT),
    (r"\$14.00", "14", RIGHT),
    ("-$14", "-14", RIGHT),
    ("$-14", "-14", RIGHT),
    ("\N{MINUS SIGN}\N{EURO SIGN}14", "-14", RIGHT),
    ("14\N{EURO SIGN}", "14", RIGHT),
    ("US$14", "14", RIGHT),
    ("$1,234.50/month", "1234.5", RIGHT),
    ("50%", "50", RIGHT),
    (r"50\%", "50", RIGHT),
    ("50%", "0.5", WRONG),
    ("50", "50%", RIGHT),
    # Units.
    ("14 apples", "14", RIGHT),
    ("14cm", "14", RIGHT),
    ("14km/h", "14", RIGHT),
    ("a 14-inch pizza", "14", RIGHT),
    ("14m\u00b2", "14", RIGHT),
    ("2x", "2", RIGHT),
    ("3rd", "3", RIGHT),
    ("5e", "5", RIGHT),
    ("14.Therefore", "14", RIGHT),
    ("14 million", "14000000", WRONG),
    # No numbers.
    ("", "14", NO_FORMAT),
    (" \n\t", "14", NO_FORMAT),
    ("fourteen", "14", NO_FORMAT),
    ("nan", "14", NO_FORMAT),
    ("inf", "14", NO_FORMAT),
    ("-Infinity", "14", NO_FORMAT),
    ("., - / % $ + e", "14", NO_FORMAT),
    ("x2", "2", NO_FORMAT),
    ("x_2", "2", NO_FORMAT),
    ("H2O", "2", NO_FORMAT),
    ("GPT-4", "4", NO_FORMAT),
    ("2x+3", "3", NO_FORMAT),
    ("0x1F", "0", NO_FORMAT),
    ("1.2.3", "1.2", NO_FORMAT),
    ("192.168.0.1", "1", NO_FORMAT),
    ("3-4", "4", NO_FORMAT),
    ("3\N{EN DASH}4", "4", NO_FORMAT),
    ("3:4", "4", NO_FORMAT),
    ("12:30", "30", NO_FORMAT),
    ("2024-01-02", "2", NO_FORMAT),
    ("1/2/2024", "2024", NO_FORMAT),
    ("1,23", "123", NO_FORMAT),
    ("1.000,5", "1000.5", NO_FORMAT),
    ("1,2345", "12345", NO_FORMAT),
    ("1'234", "234", NO_FORMAT),
    ("1_000", "1000", NO_FORMAT),
    ("2^10", "10", NO_FORMAT),
    ("7*2", "2", NO_FORMAT),
    ("7+7", "14", NO_FORMAT),
    ("1e1234567890", "1", NO_FORMAT),
    ("14, as in H2O of 2024-01-02", "14", RIGHT),
    # The ground truth.
    ("14", " $14. ", RIGHT),
    ("14", r"$14\%$", RIGHT),
    ("0.5", "$.5$", RIGHT),
    ("14", "\N{EURO SIGN}14", RIGHT),
    ("-14", "-$14", RIGHT),
    ("1234", r"1{,}234", RIGHT),
    # Huge and long.
    ("1e999999999", "14", WRONG),
    ("1e-999999999", "0", WRONG),
    ("0e999999999", "0", RIGHT),
    ("1e999999999", "1e999999999", RIGHT),
    ("10e999999998", "1e999999999", RIGHT),
    ("1e999999999/1e999999998", "10", RIGHT),
    ("9" * 1_000_000, "14", WRONG),
    ("9" * 1_000_000, "9" * 1_000_000 + ".0", RIGHT),
    ("3" * 1_000_000 + "/" + "9" * 1_000_000, "1/3", RIGHT),
    ("0." + "0" * 1_000_000 + "1", "0", WRONG),
    ("1" + ",000" * 250_000 + ",1", "1", NO_FORMAT),
    ("1." * 500_000, "1", NO_FORMAT),
    ("1" + "-" * 1_000_000, "1", RIGHT),
    ("-" * 1_000_000 + "1", "-1", RIGHT),
    ("a" * 1_000_000 + "1", "1", NO_FORMAT),
    ("1" + "a" * 1_000_000 + "1", "1", NO_FORMAT),
    ("1/0 " * 200_000, "1", NO_FORMAT),
    ("14" + " x" * 500_000, "14", RIGHT),
]
untimed = settings(deadline=None)  # a busy machine is no failure


@pytest.mark.parametrize(("response", "ground_truth", "expected"), NUMERIC_MATCH, ids=brief)
def test_numeric_match_compares_the_value_of_the_last_number(response, ground_truth, expected):
    with quickly():
        assert numeric_match_reward(response, ground_truth) == expected


@pytest.mark.parametrize(
    "ground_truth",
    [
        *("", " ", "$", "%", ".", "-", "fourteen", "inf", "nan", "\u00bd", "x2", "2x", "14 cm", "14cm", "13 or 14"),
        *("1 234", "1.2.3", "3-4", "1,23", "1.000,5", "3 / 4", "1/0", "1/2/3", r"\frac{3}{4}", "2^10", r"\sqrt{2}"),
        *(
            r"\boxed{14}",
            "1$4",
            ".$14",
            "1e1234567890",
            "#### 14",
            "14!",
            "2\u03c0",
            "5\u00b2",
            "\x00",
            "9" * 1_000_000 + "x",
        ),
    ],
    ids=brief,
)
def test_numeric_match_refuses_a_ground_truth_that_is_anything_but_a_number(ground_truth):
    with pytest.raises(ValueError, match=r"^`ground_truth` is .{2,43}, expected one number, such as 1,234\.5, -3/4 or"):
        numeric_match_reward("14", ground_truth)


@untimed
@given(anything)
def test_numeric_match_takes_any_text(response):
    assert numeric_match_reward(response, "14") in (NO_FORMAT, WRONG, RIGHT)


@untimed
@given(anything)
def test_numeric_match_takes_any_ground_truth_that_equals_itself(ground_truth):
    try:
        rewards = numeric_match_reward("0.", ground_truth)
    except ValueError as error:
        assert str(error).startswith("`ground_truth` is ")  # noqa: PT017 (other texts are numbers)
    else:
        assert rewards in (WRONG, RIGHT)
        assert numeric_match_reward(ground_truth, ground_truth) == RIGHT


@untimed
@given(anything, st.decimals(allow_nan=False, allow_infinity=False), st.text(st.characters(exclude_categories=["Nd"])))
def test_numeric_match_finds_a_number_between_any_text_and_text_without_digits(before, number, after):
    assert numeric_match_reward(f"{before} {number} {after}", str(number)) == RIGHT
