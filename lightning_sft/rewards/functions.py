"""Reward functions: a response and its reference answer in, three numbers out."""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, Context, Decimal
from typing import SupportsFloat

from lightning_sft.errors import shorten
from lightning_sft.rewards.answers import NUMBER, equal, value

RewardFunction = Callable[[str, str], Mapping[str, float]]  # of response and ground truth
REWARD_KEYS = ("format_reward", "answer_reward", "reward")

_LAST_BOX = re.compile(r".*\\(?:boxed|fbox)\s*\{", re.DOTALL)
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

# What is joined to a digit belongs to it: `x2`, `1.2.3`, `3-4` and `12:30` are one piece each, and no number.
_JOINED = re.compile(r"[+-]?(?:(?<!\.)\.)?[A-Za-z\d][A-Za-z_\d]*+(?:(?:[-.,/^*+'’–]|(?<=\d):)++[A-Za-z_\d]++)*+")  # noqa: RUF001
_RATIO = rf"({NUMBER})(?:/({NUMBER}))?"
_RATIO_AND_UNIT = re.compile(rf"{_RATIO}(?:[-.,/]?[A-Za-z_]++)*+")
_RATIO_ALONE = re.compile(rf"[\s$€£¥%\\]*+{_RATIO}[\s$€£¥%\\.]*+")
_SIGNED_CURRENCY = re.compile(r"(?<=[-+])\\?[$€£¥](?=[.\d])")
_EXACT = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN)


def r1_zero_reward(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward of the r1_zero format, `reasoning </think> <answer> answer </answer>`; the prompt ended in `<think>`.

    Format. The last `<answer>` of the response directly follows a `</think>` and one space, and a `</answer>` comes
    after it. This is stricter than the course, which accepts the separator anywhere: a second answer after the first,
    or one `<answer>` inside another, is a wrong format. Tags inside the reasoning count as reasoning. An empty answer
    has the right format, but is never correct.

    Answer. The text between the last `<answer>` and the next `</answer>`, or the last `\boxed{}` in it: listing guesses
    gains nothing. Text after it is ignored, unless it opens another answer: stop the generation at `</answer>`.

    Equal answers. Whitespace, `$`, a final full stop, and a `\boxed{}`, `\fbox{}` or `\text{}` around the whole are
    ignored. Two plain numbers (`1,234`, `-.5`, `1e5`) are equal if their values are, exactly. A ground truth of plain
    words is compared as text, ignoring case. math-verify decides the rest, read as LaTeX. By its rules a percent sign
    is optional (`50%` is 50 and 0.5), and so are the units it knows (`14 hours` and `14 cm` are 14, `14 dollars` is
    not); decimals are compared to the sixth place; and an expression need not be evaluated: `7+7` is 14. For a task
    that requires evaluation, write a stricter function.

    Args:
        response: What the model generated after the prompt.
        ground_truth: The reference answer: a number, LaTeX with or without `$`, or words.

    Returns:
        `format_reward` and `answer_reward`, each 0 or 1 (the second only if the first), and `reward`, the second.

    Raises:
        RuntimeError: math-verify is missing or broken.

    Source: Stanford CS336, assignment 5, `r1_zero_reward_fn`; the format is DeepSeek-R1-Zero's.
    """
    before, _, after = response.rpartition("<answer>")
    answer, closing, _ = after.partition("</answer>")
    if not before.endswith("</think> ") or not closing:
        return _rewards(False, False)
    boxed = _last_boxed(answer)
    return _rewards(True, equal(answer if boxed is None else boxed, ground_truth))


def boxed_answer_reward(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward of an answer in a box, `... is $\boxed{14}$.`, as in the MATH data set; no other text is read.

    Format. The last opening `\boxed{` or `\fbox{` is closed again. Braces inside it must be balanced, except `\{` and
    `\}`; whitespace may precede the first. A command without a brace, as in `\boxed 5`, is not a box. A last box that
    is cut off is a wrong format, whatever was boxed before. An empty box has the right format, but is never correct.

    Answer. The content of that box, of nested boxes the inner one; compared as `r1_zero_reward` does.

    Args:
        response: What the model generated after the prompt.
        ground_truth: The reference answer: a number, LaTeX with or without `$` or a box around it, or words.

    Returns:
        `format_reward` and `answer_reward`, each 0 or 1 (the second only if the first), and `reward`, the second.

    Raises:
        RuntimeError: math-verify is missing or broken.

    Source: the convention of Hendrycks et al., 2021, "Measuring Mathematical Problem Solving With the MATH Dataset".
    """
    answer = _last_boxed(response)
    return _rewards(answer is not None, answer is not None and equal(answer, ground_truth))


def numeric_match_reward(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward of the last number in a response, `So 7 and 7 make 14.`, compared by its exact value.

    Numbers. `14`, `-.5`, `1,234.50`, `1e5` (at most nine digits of exponent), and a fraction of two of them without
    spaces, `3/4`; in the digits of any script. Currency signs are ignored, as are a percent sign (`50%` is 50) and a
    unit of letters that follows directly (`14cm`, `14km/h`; so `2x` is 2, and `3rd` is 3). A sign belongs to the number
    only if directly before it: `7 - 3` ends in 3.

    Not numbers, so skipped: what is joined to a letter before it (`x2`, `H2O`, `GPT-4`) or to more digits in any other
    way (`1.2.3`, `3-4`, `7+7`, `2^10`, `12:30`, `2024-01-02`, `1,23`, `1.000,5`); numbers in words, `inf`, `nan`, `½`;
    and a fraction with denominator zero, `1/0`. Roots, powers like `5²`, mixed numbers and LaTeX are not parsed, except
    `{,}` between thousands: the last number of `1 3/4` is 3/4, and of `\frac{3}{4}` it is 4. For these use
    `boxed_answer_reward`.

    Args:
        response: What the model generated after the prompt.
        ground_truth: One number; currency and percent signs, whitespace and full stops around it are ignored.

    Returns:
        `format_reward`, 1 if there is a number; `answer_reward`, 1 if it is also the right one; and `reward`, the
        second.

    Raises:
        ValueError: If `ground_truth` is not exactly one number: no response could be correct.
    """
    expected = _fraction(_RATIO_ALONE.fullmatch(_plain(ground_truth)))
    if expected is None:
        came = f"`ground_truth` is {shorten(ground_truth)}"
        raise ValueError(f"{came}, expected one number, such as 1,234.5, -3/4 or 1e5. Take another reward function.")
    for piece in reversed(_JOINED.findall(_plain(response))):
        if fraction := _fraction(_RATIO_AND_UNIT.fullmatch(piece)):
            left, right = _EXACT.multiply(fraction[0], expected[1]), _EXACT.multiply(expected[0], fraction[1])
            return _rewards(True, left == right)
    return _rewards(False, False)


def exact_match_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Reward of a response that is the answer and nothing else, character by character but for whitespace around it.

    Args:
        response: What the model generated after the prompt.
        ground_truth: The answer.

    Returns:
        `format_reward`, 1 unless the response is blank; `answer_reward`, 1 if it also equals the ground truth;
        and `reward`, the second.
    """
    answer = response.strip()
    return _rewards(answer != "", answer != "" and answer == ground_truth.strip())


def checked_reward(reward_fn: RewardFunction, response: str, ground_truth: str) -> dict[str, float]:
    """Call a reward function and check what it returns. What it raises is not caught.

    Args:
        reward_fn: Returns a mapping with at least the keys `format_reward`, `answer_reward` and `reward`. Numbers may
            be anything of one element that `float` takes, except text: bool, NumPy scalar, tensor.
        response: Its first argument.
        ground_truth: Its second.

    Returns:
        The three numbers as floats; other keys are dropped.

    Raises:
        TypeError: It did not return a mapping, or a value is not a number.
        ValueError: A key is missing, or a value is not finite.
    """
    returned = reward_fn(response, ground_truth)
    came = f"The reward function `{getattr(reward_fn, '__name__', reward_fn)}` returned {reprlib.repr(returned)}"
    expected = f"Return a dict with the keys {', '.join(REWARD_KEYS)}, each a finite number."
    if not isinstance(returned, Mapping):
        raise TypeError(f"{came}, a {type(returned).__name__}. {expected}")
    if missing := [key for key in REWARD_KEYS if key not in returned]:
        raise ValueError(f"{came}, without {', '.join(missing)}. {expected}")
    rewards = {}
    for key in REWARD_KEYS:
        try:
            if not isinstance(returned[key], SupportsFloat):  # as text is not, though `float` takes it
                raise TypeError
            rewards[key] = float(returned[key])
        except (TypeError, ValueError, OverflowError) as error:  # an array of several elements, too
            raise TypeError(f"{came}, where `{key}` cannot be made a float. {expected}") from error
        if not math.isfinite(rewards[key]):
            raise ValueError(f"{came}, where `{key}` is {rewards[key]}. {expected}")
    return rewards


def _rewards(format_is_right: bool, answer_is_right: bool) -> dict[str, float]:
    right = float(answer_is_right)
    return {"format_reward": float(format_is_right), "answer_reward": right, "reward": right}


def _last_boxed(text: str) -> str | None:
    """What stands in the last box to open, if that is closed again."""
    if not (opening := _LAST_BOX.match(text)):
        return None
    depth = 1
    for brace in _BRACES.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[opening.end() : brace.start()]
    return None


def _plain(text: str) -> str:
    return _SIGNED_CURRENCY.sub("", text.replace("\N{MINUS SIGN}", "-").replace("{,}", ","))


def _fraction(ratio: re.Match[str] | None) -> tuple[Decimal, Decimal] | None:
    """Numerator and denominator. Not divided, nor made integers: that could round, or write out a huge exponent."""
    if ratio is None:
        return None
    numerator, denominator = value(ratio[1]), value(ratio[2] or "1")
    return (numerator, denominator) if denominator else None
