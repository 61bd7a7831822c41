"""`boxed_answer_reward`: boxes spelled by hand, and any text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rewards import NO_FORMAT, RIGHT, WRONG, anything, brief, quickly

from lightning_sft.rewards.answers import normalized
from lightning_sft.rewards.functions import boxed_answer_reward

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
untimed = settings(deadline=None)  # a busy machine is no failure
balanced = st.recursive(
    st.sampled_from(["a", "1", " ", r"\{", r"\}", r"\\", r"\frac"]),
    lambda inner: st.lists(inner).map("".join) | inner.map("{{{}}}".format),
)


@pytest.mark.parametrize(("response", "ground_truth", "expected"), BOXED_ANSWER, ids=brief)
def test_boxed_answer_reads_the_last_box_to_its_end_and_nothing_else(response, ground_truth, expected):
    with quickly():
        assert boxed_answer_reward(response, ground_truth) == expected


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
