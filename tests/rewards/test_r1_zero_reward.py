"""`r1_zero_reward`: formats and answers spelled by hand, hostile ones among them."""

import pytest
from support.rewards import NO_FORMAT, RIGHT, WRONG, brief, quickly, respond

from lightning_sft.rewards.functions import r1_zero_reward

# Responses; the ground truth is 14.
R1_ZERO_FORMATS = [
    ("7 and 7. </think> <answer> 14 </answer>", RIGHT),
    ("7 and 7. </think> <answer>14</answer>", RIGHT),
    ("</think> <answer>14</answer>", RIGHT),
    ("7\n\nand 7\n</think> <answer>\n14\n</answer>", RIGHT),
    ("<think> 7 and 7. </think> <answer> 14 </answer>", RIGHT),
    ("7 and 7. </think> <answer> 15 </answer>", WRONG),
    # Missing or misplaced tags.
    ("", NO_FORMAT),
    ("14", NO_FORMAT),
    ("<answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </think> 14", NO_FORMAT),
    ("7 and 7. </think> <answer> 14", NO_FORMAT),
    ("7 and 7. </think> 14 </answer>", NO_FORMAT),
    ("7 and 7. <think> <answer> 14 </answer>", NO_FORMAT),
    ("<answer> 14 </answer> 7 and 7. </think>", NO_FORMAT),
    ("<answer> 14 </answer> </think> <answer>", NO_FORMAT),
    ("</answer> 7 and 7. </think> <answer> 14", NO_FORMAT),
    # Wrong spacing or spelling of the separator.
    ("7 and 7. </think><answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </think>  <answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </think>\n<answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </think>\u00a0<answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </think> so <answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </THINK> <ANSWER> 14 </ANSWER>", NO_FORMAT),
    ("7 and 7. </think> < answer> 14 </answer>", NO_FORMAT),
    # Several answers: the last one counts, and must itself follow the separator.
    ("13? </think> <answer> 13 </answer> No. </think> <answer> 14 </answer>", RIGHT),
    ("14? </think> <answer> 14 </answer> No. </think> <answer> 13 </answer>", WRONG),
    ("7 and 7. </think> <answer> 13 </answer> <answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </think> <answer> 14 </answer> <answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. </think> <answer> <answer> 14 </answer> </answer>", NO_FORMAT),
    ("7 and 7. </think> <answer> 13 </think> <answer> 14 </answer>", RIGHT),
    # Tags inside the reasoning.
    ("I shall write <answer> 13 </answer> or so. </think> <answer> 14 </answer>", RIGHT),
    ("</answer> <think> </think> </think> <answer> 14 </answer>", RIGHT),
    # What follows the answer.
    ("7 and 7. </think> <answer> 14 </answer> Goodbye, 15!", RIGHT),
    ("7 and 7. </think> <answer> 14 </answer> </answer> </think>", RIGHT),
    ("7 and 7. </think> <answer> 14 </answer> 15 </answer>", RIGHT),
    ("7 and 7. </think> <answer> 14 </answer> User: 1 + 1? <think> </think> <answer> 2 </answer>", WRONG),
    # No answer between the tags.
    ("7 and 7. </think> <answer></answer>", WRONG),
    ("7 and 7. </think> <answer> $ $ </answer>", WRONG),
    ("7 and 7. </think> <answer> </think> </answer>", WRONG),
    # Near the tags.
    ("7 and 7. </think> <answer> 14 < /answer>", NO_FORMAT),
    ("7 and 7. </think> <answer> 14 </answer", NO_FORMAT),
    ("7 and 7. </think> &lt;answer&gt; 14 &lt;/answer&gt;", NO_FORMAT),
    ("7 and 7. </think>\t<answer> 14 </answer>", NO_FORMAT),
    ("7 and 7. <think> </think> <answer> 14 </answer> <think>", RIGHT),
    ("</think> <answer>" * 1000 + "14</answer>", RIGHT),
    ("<answer>" * 100_000, NO_FORMAT),
    ("</think> <answer>14" + "</answer>" * 100_000, RIGHT),
    ("x" * 1_000_000 + "</think> <answer>14</answer>", RIGHT),
]

# Answers and ground truths that mean the same.
R1_ZERO_RIGHT = [
    # Equal as text, or as plain numbers.
    ("14", "$14$"),
    ("$14$", "14"),
    (r"\$14", "14"),
    ("14.", "14"),
    ("14.0", "14"),
    ("+014", "14"),
    (r"\boxed{14}", "14"),
    ("14", r"$\boxed{14}$"),
    (r"\[14\]", r"\(14\)"),
    (r"\[ \boxed{\text{14}} \]", "14"),
    ("1,234", "1234"),
    ("$1,234,567.50", "1234567.5"),
    ("1e5", "100,000"),
    (".5", "0.50"),
    ("\N{MINUS SIGN}5", "-5"),
    ("9" * 5000, "9" * 5000 + ".0"),
    ("paris", "Paris"),
    (r"$\text{New  York}$", "New York"),
    ("\u0661\u0664", "14"),
    # Equal by math-verify.
    ("0.5", r"\frac{1}{2}"),
    (r"\frac{1}{2}", "0.5"),
    ("1/2", r"$\frac{1}{2}$"),
    (r"\dfrac12", r"\boxed{\frac{1}{2}}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    ("0.333333", "1/3"),
    ("3.5", r"3\frac{1}{2}"),
    ("2^{1/2}", r"\sqrt{2}"),
    ("1 + x^2", "x^2+1"),
    (r"\left( 1, 2 \right)", "(1,2)"),
    ("3, 1, 2", r"\{1, 2, 3\}"),
    ("x = 14", "14"),
    ("- 5", "-5"),
    ("1{,}234", "1234"),
    ("x\n= 14", "14"),
    ("10^{20}", "100000000000000000000"),
    ("(A)", "A"),
    # Percent signs and known units are optional; expressions need not be evaluated.
    ("50%", "50"),
    (r"50\%", "0.5"),
    ("50", r"50\%"),
    ("14 hours", "14"),
    (r"14\text{ apples}", "14"),
    ("14", r"14\text{ cm}"),
    ("7+7", "14"),
    # Boxes around all of it or a part.
    (r"\fbox{14}", "14"),
    (r"x = \boxed{14}", "14"),
    (r"13 \boxed{14}", "14"),
    (r"13, \fbox{14}", "14"),
    (r"13 or \boxed {14}", "14"),
    (r"\boxed{13} \boxed{14}", "14"),
    (r"\boxed{\boxed{ 14 }}", r"\fbox{14}"),
    (r"\boxed{" * 200_000 + "14" + "}" * 200_000, "14"),
    # Sets, intervals, matrices, roots, angles.
    (r"\{1,2\} \cup \{3\}", r"\{1,2,3\}"),
    ("[0,1)", r"\left[0, 1\right)"),
    (r"x \in [0,1]", "[0,1]"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"90^\circ", "90"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\tfrac{1}{2}", "1/2"),
    (r"\[ \boxed{ \text{ paris } } \]", "Paris"),
    # Words of two letters.
    ("No.", "no"),
]

# Answers and ground truths that do not.
R1_ZERO_WRONG = [
    # Listing guesses.
    ("13 or 14", "14"),
    ("14 or 13", "14"),
    ("13, 14, 15", "14"),
    ("$13$ $14$", "14"),
    ("14$ or $13", "14"),
    (r"\boxed{14} \boxed{13}", "14"),
    (r"\pm 14", "14"),
    ("13 = 14 = 15", "14"),
    ("the answer is not 14", "14"),
    ("13 14", "14"),
    ("1,2", r"\{1, 2, 3\}"),
    # Numbers that are near, or look alike.
    ("-14", "14"),
    ("14.0000001", "14"),
    ("0.33", "1/3"),
    ("1.234", "1234"),
    ("12,34", "1234"),
    ("1,2345", "12345"),
    ("9" * 5000, "9" * 4999 + "8"),
    ("9" * 60, "1e60"),
    ("1e999999999", "14"),
    ("14!", "14"),
    ("inf", "14"),
    ("nan", "14"),
    (r"\frac{0}{0}", "14"),
    (r"\frac{1}{3}", r"\frac{1}{2}"),
    # Units and words.
    ("14 million", "14"),
    ("14 dollars", "14"),
    ("5%", "50"),
    ("fourteen", "14"),
    ("Pairs", "Paris"),
    ("sey", "yes"),
    ("Paris or Rome", "Paris"),
    ("y^2 + 1", "x^2+1"),
    ("1", "2x + z = 1"),
    ("10 4", "14"),
    ("14", "10 4"),
    ("[1, 2]", "(1, 2)"),
    # Junk.
    ("14)", "14"),
    (r"\frac{", "14"),
    ("\x00", "14"),
    ("\ud800", "14"),
    ("\u2665", "14"),
    ("{" * 50, "14"),
    ("1^" * 500, "14"),
    ("__import__('os').getpid()", "14"),
    ("14", ""),
    ("", ""),
    # Another box is the last, or a box is around a part.
    (r"\boxed{13}, 14", "14"),
    (r"1\boxed{4}", "14"),
    # Sets, intervals, matrices, roots.
    (r"\{1, 2\}", r"\{1, 2, 3\}"),
    ("(0,1)", "[0,1]"),
    (r"(-\infty,2)", r"(-\infty,2]"),
    ("(2,1)", "(1,2)"),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("1.414", r"\sqrt{2}"),
    (r"\sqrt{2}", r"2\sqrt{2}"),
    ("-1/2", r"\frac{1}{2}"),
    ("x = 13", "14"),
    ("on", "no"),
]


@pytest.mark.parametrize(("response", "expected"), R1_ZERO_FORMATS, ids=brief)
def test_the_format_is_closed_reasoning_then_one_space_then_one_answer(response, expected):
    with quickly():
        assert r1_zero_reward(response, "14") == expected


@pytest.mark.parametrize(("answer", "ground_truth"), R1_ZERO_RIGHT, ids=brief)
def test_answers_that_mean_the_ground_truth_are_right(answer, ground_truth):
    with quickly():
        assert r1_zero_reward(respond(answer), ground_truth) == RIGHT


@pytest.mark.parametrize(("answer", "ground_truth"), R1_ZERO_WRONG, ids=brief)
def test_answers_that_mean_anything_else_are_wrong(answer, ground_truth):
    assert r1_zero_reward(respond(answer), ground_truth) == WRONG
