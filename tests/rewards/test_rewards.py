"""Rewards: formats and answers spelled by hand, hostile ones among them."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft.rewards.answers import normalized
from lightning_sft.rewards.functions import (
    REWARD_KEYS,
    boxed_answer_reward,
    checked_reward,
    exact_match_reward,
    numeric_match_reward,
    r1_zero_reward,
)

NO_FORMAT = {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}
WRONG = {"format_reward": 1.0, "answer_reward": 0.0, "reward": 0.0}
RIGHT = {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0}


def respond(answer: str) -> str:
    return f"7 and 7 make that. </think> <answer> {answer} </answer>"


@contextmanager
def quickly() -> Iterator[None]:
    """Within seconds on a busy machine. Quadratic time would take a minute or more for the long ones."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


def brief(value: object) -> str | None:
    """A name for a test; a long response is none."""
    return ascii(value)[1:31] if isinstance(value, str) else None


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
# Response, ground truth, rewards.
BOXED_ANSWER = [
    # The box, and what stands around it.
    (r"\boxed{14}", "14", RIGHT),
    (r"7 and 7 make $\boxed{14}$.", "14", RIGHT),
    (r"$$\boxed{14}$$", "14", RIGHT),
    (r"\[ x = \boxed{14} \]", "14", RIGHT),
    ("So\n\\boxed{\n14\n}\n", "14", RIGHT),
    (r"\boxed{ 14 }", "14", RIGHT),
    (r"\boxed{14.}", "14", RIGHT),
    (r"\boxed{$14$}", "14", RIGHT),
    (r"\fbox{14}", "14", RIGHT),
    (r"\fbox{$14$}", "14", RIGHT),
    (r"\boxed {14}", "14", RIGHT),
    ("\\boxed\n\t {14}", "14", RIGHT),
    (r"a \\ \boxed{14}", "14", RIGHT),
    (r"a \\\boxed{14}", "14", RIGHT),
    (r"a\\boxed{14}", "14", RIGHT),
    (r"13, 15, \boxed{14}", "14", RIGHT),
    (r"15 <answer> 13 </answer> \boxed{14}", "14", RIGHT),
    (r"{{{ \boxed{14}", "14", RIGHT),
    (r"}}} \boxed{14}", "14", RIGHT),
    (r"\text{So \boxed{14} it is}", "14", RIGHT),
    # Text after the box.
    (r"\boxed{14} 15", "14", RIGHT),
    (r"\boxed{14}}}}}", "14", RIGHT),
    (r"\boxed{14}{{{{", "14", RIGHT),
    (r"\boxed{14} dollars", "14", RIGHT),
    (r"\boxed{14}\boxed", "14", RIGHT),
    (r"\boxed{13} or else 14", "14", WRONG),
    # No box.
    ("", "14", NO_FORMAT),
    (" \n", "14", NO_FORMAT),
    ("14", "14", NO_FORMAT),
    ("$14$", "14", NO_FORMAT),
    ("{14}", "14", NO_FORMAT),
    ("boxed{14}", "14", NO_FORMAT),
    (r"\Boxed{14}", "14", NO_FORMAT),
    (r"\box{14}", "14", NO_FORMAT),
    (r"\mbox{14}", "14", NO_FORMAT),
    (r"\boxedx{14}", "14", NO_FORMAT),
    (r"\ boxed{14}", "14", NO_FORMAT),
    (r"/boxed{14}", "14", NO_FORMAT),
    (r"\boxed[14]", "14", NO_FORMAT),
    (r"\boxed(14)", "14", NO_FORMAT),
    (r"\boxed\{14\}", "14", NO_FORMAT),
    (r"\text{14}", "14", NO_FORMAT),
    ("\x08oxed{14}", "14", NO_FORMAT),
    # No brace.
    (r"\boxed 5", "5", NO_FORMAT),
    (r"\boxed14", "14", NO_FORMAT),
    (r"\boxed", "14", NO_FORMAT),
    (r"\boxed{14} \boxed 5", "14", RIGHT),
    (r"\boxed{14} \boxed 5", "5", WRONG),
    (r"\boxed 5 {14}", "14", NO_FORMAT),
    # Not closed.
    (r"\boxed{", "14", NO_FORMAT),
    (r"\boxed{14", "14", NO_FORMAT),
    (r"\boxed{14\}", "14", NO_FORMAT),
    (r"\boxed{\frac{14}{1}", "14", NO_FORMAT),
    (r"\boxed{{14}", "14", NO_FORMAT),
    (r"\boxed{14} and \boxed{14", "14", NO_FORMAT),
    (r"\boxed{13} and \boxed{", "13", NO_FORMAT),
    (r"\boxed{14} and \fbox{", "14", NO_FORMAT),
    # Several boxes.
    (r"\boxed{13} \boxed{14}", "14", RIGHT),
    (r"\boxed{14} \boxed{13}", "14", WRONG),
    (r"\fbox{13} \boxed{14}", "14", RIGHT),
    (r"\boxed{13} \fbox{14}", "14", RIGHT),
    (r"\boxed{13 \boxed{14}", "14", RIGHT),
    (r"\boxed{14} \boxed{}", "14", WRONG),
    (r"\boxed{\boxed{14}}", "14", RIGHT),
    (r"\boxed{13 \boxed{14} 15}", "14", RIGHT),
    (r"\boxed{13 + \fbox{1}}", "14", WRONG),
    (r"\boxed{13} \boxed{14} \boxed{15}", "14", WRONG),
    # An empty box.
    (r"\boxed{}", "14", WRONG),
    (r"\boxed{ }", "14", WRONG),
    (r"\boxed{$ $}", "14", WRONG),
    (r"\boxed{}", "", WRONG),
    (r"\boxed{14}", "", WRONG),
    # Braces inside.
    (r"\boxed{\frac{1}{2}}", "1/2", RIGHT),
    (r"\boxed{\dfrac{1}{2}} cups", "0.5", RIGHT),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}", RIGHT),
    (r"\boxed{\frac12}", r"\frac{1}{2}", RIGHT),
    (r"\boxed{{14}}", "14", RIGHT),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}", RIGHT),
    (r"\boxed{\{1, 2}", r"\{1, 2", RIGHT),
    (r"\boxed{1, 2\}}", r"1, 2\}", RIGHT),
    (r"\boxed{a \\}", r"a \\", RIGHT),
    (r"\boxed{x^{2^{n}}}", r"x^{2^{n}}", RIGHT),
    (r"\boxed{\left\{ \frac{1}{2} \right\}}", r"\{1/2\}", RIGHT),
    (r"\boxed{\{1\} \cup \{2, 3\}}", r"\{1, 2, 3\}", RIGHT),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", RIGHT),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", WRONG),
    (r"\boxed{\text{Paris}}", "Paris", RIGHT),
    (r"\boxed{\text{(A)}}", "A", RIGHT),
    # The ground truth's own box.
    (r"\boxed{14}", r"\boxed{14}", RIGHT),
    (r"\boxed{14}", r"$\boxed{14}$.", RIGHT),
    (r"\boxed{14}", r"\fbox{14}", RIGHT),
    (r"\boxed{paris}", r"\fbox{Paris}", RIGHT),
    (r"\boxed{pairs}", r"\fbox{Paris}", WRONG),
    (r"\boxed{1/2}", r"\boxed{\frac{1}{2}}", RIGHT),
    (r"\boxed{15}", r"\boxed{14}", WRONG),
    ("14", r"\boxed{14}", NO_FORMAT),
    # Equal, and not.
    (r"\boxed{1,234}", "1234", RIGHT),
    (r"\boxed{1{,}234}", "1234", RIGHT),
    (r"\boxed{-14}", "\N{MINUS SIGN}14", RIGHT),
    ("\\boxed{\N{MINUS SIGN}14}", "-14", RIGHT),
    (r"\boxed{14\text{ cm}}", "14", RIGHT),
    (r"\boxed{50\%}", "50", RIGHT),
    (r"\boxed{\$14}", "14", RIGHT),
    (r"\boxed{x = 14}", "14", RIGHT),
    (r"\boxed{[0, 1)}", "[0,1)", RIGHT),
    (r"\boxed{(0, 1)}", "[0,1)", WRONG),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", RIGHT),
    (r"\boxed{14!}", "14", WRONG),
    (r"\boxed{-14}", "14", WRONG),
    (r"\boxed{13 or 14}", "14", WRONG),
    (r"\boxed{13, 14}", "14", WRONG),
    (r"\boxed{fourteen}", "14", WRONG),
    (r"\boxed{1e999999999}", "14", WRONG),
    (r"\boxed{Rome}", "Paris", WRONG),
    ("\\boxed{\x00}", "14", WRONG),
    ("\\boxed{\ud800}", "14", WRONG),
    # Long.
    ("{" * 100_000, "14", NO_FORMAT),
    ("\\" * 100_001, "14", NO_FORMAT),
    (r"\boxed{" * 50_000, "14", NO_FORMAT),
    (r"\boxed{" * 50_000 + "14", "14", NO_FORMAT),
    (r"\boxed{" * 50_000 + "14" + "}" * 50_000, "14", RIGHT),
    (r"\boxed{" + "{" * 100_000, "14", NO_FORMAT),
    (r"\boxed{" + r"\{" * 100_000, "14", NO_FORMAT),
    (r"\boxed{" + "{" * 50_000 + "Rome" + "}" * 50_001, "Paris", WRONG),
    (r"\boxed{" + "9" * 100_000 + "}", "9" * 100_000, RIGHT),
    (r"\boxed" + " " * 100_000, "14", NO_FORMAT),
    (r"\boxed{14}" + r"\boxed " * 50_000, "14", RIGHT),
    ("x" * 1_000_000 + r"\boxed{14}" + "x" * 1_000_000, "14", RIGHT),
]
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
EXACT_MATCH = [
    # The same.
    ("14", "14", RIGHT),
    ("x", "x", RIGHT),
    ("0", "0", RIGHT),
    ("-14", "-14", RIGHT),
    (".", ".", RIGHT),
    ("\\", "\\", RIGHT),
    ("Paris", "Paris", RIGHT),
    ("New York", "New York", RIGHT),
    ("7 + 7 = 14", "7 + 7 = 14", RIGHT),
    (r"\frac{1}{2}", r"\frac{1}{2}", RIGHT),
    (r"\boxed{14}", r"\boxed{14}", RIGHT),
    ("</think> <answer> 14 </answer>", "</think> <answer> 14 </answer>", RIGHT),
    ("one\ntwo", "one\ntwo", RIGHT),
    ("\u7b54\u6848", "\u7b54\u6848", RIGHT),
    ("caf\u00e9", "caf\u00e9", RIGHT),
    ("\U0001f600", "\U0001f600", RIGHT),
    ("\x00", "\x00", RIGHT),
    ("\ud800", "\ud800", RIGHT),
    ("nan", "nan", RIGHT),
    ("None", "None", RIGHT),
    ('{"a": [1, 2]}', '{"a": [1, 2]}', RIGHT),
    ("x" * 1_000_000, "x" * 1_000_000, RIGHT),
    ("(" * 100_000, "(" * 100_000, RIGHT),
    ("1e999999999", "1e999999999", RIGHT),
    # Whitespace around.
    (" 14\n", "14 ", RIGHT),
    ("14 ", "14", RIGHT),
    ("14", " 14", RIGHT),
    ("\t14", "14", RIGHT),
    ("\r\n14\r\n", "14", RIGHT),
    ("14\x0b\x0c", "14", RIGHT),
    ("\u00a014\u00a0", "14", RIGHT),
    ("\u200314", "14", RIGHT),
    ("\u300014", "14", RIGHT),
    ("14\u2028", "14", RIGHT),
    ("\n one\n two\n", "one\n two", RIGHT),
    (" " * 1_000_000 + "14", "14", RIGHT),
    # What looks like whitespace, but is none.
    ("\u200b14", "14", WRONG),
    ("\ufeff14", "14", WRONG),
    ("14\x00", "14", WRONG),
    ("14\u2060", "14", WRONG),
    # Whitespace inside.
    ("New  York", "New York", WRONG),
    ("NewYork", "New York", WRONG),
    ("New\nYork", "New York", WRONG),
    ("New\tYork", "New York", WRONG),
    ("New\u00a0York", "New York", WRONG),
    ("one\r\ntwo", "one\ntwo", WRONG),
    ("1 4", "14", WRONG),
    ("(1,2)", "(1, 2)", WRONG),
    ("- 14", "-14", WRONG),
    # Case.
    ("Paris", "paris", WRONG),
    ("PARIS", "Paris", WRONG),
    ("paris", "Paris", WRONG),
    ("True", "true", WRONG),
    ("stra\u00dfe", "strasse", WRONG),
    ("\u0130", "i", WRONG),
    # Other spellings of the same value.
    ("14.0", "14", WRONG),
    ("14.", "14", WRONG),
    ("+14", "14", WRONG),
    ("014", "14", WRONG),
    ("1,234", "1234", WRONG),
    ("1{,}234", "1,234", WRONG),
    ("1e5", "100000", WRONG),
    ("1/2", "0.5", WRONG),
    (".5", "0.5", WRONG),
    ("-0", "0", WRONG),
    ("7+7", "14", WRONG),
    ("\N{MINUS SIGN}14", "-14", WRONG),
    ("\uff11\uff14", "14", WRONG),
    ("\u0661\u0664", "14", WRONG),
    ("fourteen", "14", WRONG),
    ("xiv", "14", WRONG),
    ("1e5", "1E5", WRONG),
    # LaTeX.
    ("$14$", "14", WRONG),
    (r"\boxed{14}", "14", WRONG),
    ("14", r"\boxed{14}", WRONG),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", WRONG),
    (r"\frac12", r"\frac{1}{2}", WRONG),
    (r"\{2, 1\}", r"\{1, 2\}", WRONG),
    (r"\left(1, 2\right)", "(1, 2)", WRONG),
    (r"\sqrt2", r"\sqrt{2}", WRONG),
    (r"\text{Paris}", "Paris", WRONG),
    # More than the answer, or less.
    ("</think> <answer> 14 </answer>", "14", WRONG),
    ("14", "<answer> 14 </answer>", WRONG),
    ("The answer is 14", "14", WRONG),
    ("14 14", "14", WRONG),
    ("13 or 14", "14", WRONG),
    ("14 cm", "14", WRONG),
    ("14%", "14", WRONG),
    ("$14", "14", WRONG),
    ('"14"', "14", WRONG),
    ("'14'", "14", WRONG),
    ("**14**", "14", WRONG),
    ("14!", "14", WRONG),
    ("1", "14", WRONG),
    ("4", "14", WRONG),
    ("141", "14", WRONG),
    ("41", "14", WRONG),
    ("15", "14", WRONG),
    ("Paris\nRome", "Paris", WRONG),
    ("x" * 1_000_000, "x" * 999_999, WRONG),
    ("x" * 999_999 + "y", "x" * 1_000_000, WRONG),
    # Characters that look alike.
    ("cafe\u0301", "caf\u00e9", WRONG),
    ("\u0410", "A", WRONG),
    ("l4", "14", WRONG),
    ("1O", "10", WRONG),
    ("\ufb01ve", "five", WRONG),
    ("3\N{EN DASH}4", "3-4", WRONG),
    ("it\u2019s", "it's", WRONG),
    ("\u00b5m", "\u03bcm", WRONG),
    # Nothing.
    ("", "14", NO_FORMAT),
    (" \n", "14", NO_FORMAT),
    ("", "", NO_FORMAT),
    (" ", " ", NO_FORMAT),
    ("\u00a0\u3000", "14", NO_FORMAT),
    ("\t" * 1_000_000, "14", NO_FORMAT),
    ("\u200b", "14", WRONG),
    ("14", "", WRONG),
    ("14", " \n", WRONG),
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


@pytest.mark.parametrize(("response", "ground_truth", "expected"), BOXED_ANSWER, ids=brief)
def test_boxed_answer_reads_the_last_box_to_its_end_and_nothing_else(response, ground_truth, expected):
    with quickly():
        assert boxed_answer_reward(response, ground_truth) == expected


@pytest.mark.parametrize(("response", "ground_truth", "expected"), NUMERIC_MATCH, ids=brief)
def test_numeric_match_compares_the_value_of_the_last_number(response, ground_truth, expected):
    with quickly():
        assert numeric_match_reward(response, ground_truth) == expected


@pytest.mark.parametrize(("response", "ground_truth", "expected"), EXACT_MATCH, ids=brief)
def test_exact_match_compares_every_character_but_the_whitespace_around(response, ground_truth, expected):
    assert exact_match_reward(response, ground_truth) == expected


@pytest.mark.parametrize(
    "cases",
    [
        [
            *((response, "14") for response, _ in R1_ZERO_FORMATS),
            *((respond(answer), ground_truth) for answer, ground_truth in R1_ZERO_RIGHT + R1_ZERO_WRONG),
        ],
        *([case[:2] for case in table] for table in (BOXED_ANSWER, NUMERIC_MATCH, EXACT_MATCH)),
    ],
    ids=["r1_zero", "boxed_answer", "numeric_match", "exact_match"],
)
def test_each_reward_has_a_hundred_cases_and_none_twice(cases):
    assert len(set(cases)) == len(cases) >= 100


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


untimed = settings(deadline=None)  # a busy machine is no failure
anything = st.text() | st.lists(
    st.sampled_from([*r"{}\$%.,/:-+_^e'0123 x", r"\boxed{", r"\fbox", "1e", ",000", "\N{MINUS SIGN}", "\u0664"])
).map("".join)
balanced = st.recursive(
    st.sampled_from(["a", "1", " ", r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.lists(inner).map("".join) | inner.map("{{{}}}".format),
)


@untimed
@given(anything)
def test_boxed_answer_takes_any_text(response):
    rewards = boxed_answer_reward(response, "Paris")
    assert rewards in (NO_FORMAT, WRONG, RIGHT)
    assert r"\boxed{" in response or r"\fbox" in response or rewards == NO_FORMAT


@untimed
@given(anything, balanced, st.text(st.characters(exclude_characters="\\")))
def test_boxed_answer_finds_balanced_content_whatever_stands_around(before, content, after):
    expected = RIGHT if normalized(content) else WRONG
    assert boxed_answer_reward(rf"{before}\boxed{{{content}}}{after}", content) == expected


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
