"""Reward functions: a response and its reference answer in, three numbers out.

math-verify runs in a process of its own. It limits its time by SIGALRM, which works in the main thread only (elsewhere
it raises); without that limit, one answer such as `9^{9^{9}}` or many nested parentheses stops a whole training job.
A process can be ended from any thread. It starts when two answers are neither equal as text nor plain numbers.
"""

import atexit
import contextlib
import json
import math
import os
import re
import reprlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import SupportsFloat

RewardFunction = Callable[[str, str], Mapping[str, float]]
REWARD_KEYS = ("format_reward", "answer_reward", "reward")
MATH_VERIFY_SECONDS = 5.0  # per pair of answers; an ordinary one takes a hundredth

_NUMBER = re.compile(r"[+-]?(?=[.\d])(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,9})?")
_WORDS = re.compile(r"[a-z' ]*[a-z]{3}[a-z' ]*", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:boxed|text)\{(.*)\}|\\\[(.*)\\\]")
_TWO_NUMBERS = re.compile(r"\d \d")


def r1_zero_reward(response: str, ground_truth: str) -> dict[str, float]:
    r"""Reward of the r1_zero format, `reasoning </think> <answer> answer </answer>`; the prompt ended in `<think>`.

    Format. The last `<answer>` of the response directly follows a `</think>` and one space, and a `</answer>` comes
    after it. Stricter than the course, which accepts the separator anywhere: a second answer after the first, or one
    `<answer>` inside another, is a wrong format. Tags inside the reasoning are reasoning. An empty answer is of the
    right format, but never right.

    Answer. What stands between the last `<answer>` and the next `</answer>`, so listing guesses gains nothing. Text
    after it is ignored, unless it opens another answer: stop the generation at `</answer>`.

    Equal answers. Whitespace, `$`, a final full stop, and a `\boxed{}` or `\text{}` around the whole do not count.
    Two plain numbers (`1,234`, `-.5`, `1e5`) are equal if their values are, exactly. A ground truth of plain words is
    compared as text, ignoring case. math-verify decides the rest, read as LaTeX. By its rules a percent sign is
    optional (`50%` is 50 and 0.5), and so are the units it knows (`14 hours` and `14 cm` are 14, `14 dollars` is not);
    decimals count to the sixth place; and an expression need not be evaluated: `7+7` is 14. For a task that asks to
    evaluate one, write a stricter function.

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
    return _rewards(True, _equal(answer, ground_truth))


def exact_match_reward(response: str, ground_truth: str) -> dict[str, float]:
    """Reward of a response that is the answer and nothing else, character by character but for whitespace around it.

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


def _normalized(text: str) -> str:
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "").replace("$", "")
    text = " ".join(text.split()).removesuffix(".")
    while wrapped := _WRAPPED.fullmatch(text):
        text = "".join(wrapped.groups(default="")).strip()
    return text


def _equal(answer: str, ground_truth: str) -> bool:
    answer, ground_truth = _normalized(answer), _normalized(ground_truth)
    if not answer or not ground_truth:
        return False
    if answer == ground_truth:
        return True
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(ground_truth):
        return Decimal(answer.replace(",", "")) == Decimal(ground_truth.replace(",", ""))
    if _WORDS.fullmatch(ground_truth):  # math-verify takes a word for the product of its letters: Paris = pairs
        return answer.casefold() == ground_truth.casefold()
    if _TWO_NUMBERS.search(answer) or _TWO_NUMBERS.search(ground_truth):  # math-verify adds them up: 10 4 = 14
        return False
    # By process id: a fork must share neither its parent's pipe nor a lock that another thread holds.
    return _workers.setdefault(os.getpid(), _MathVerify()).equal(answer, ground_truth)


class _MathVerify:
    """The process that runs `_serve`: started at the first question, and again after it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, answer: str, ground_truth: str) -> bool:
        """Whether math-verify finds the two equal; False if the question takes too long or crashes it."""
        with self._lock:
            reply = ""
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                reply = self._ask(answer, ground_truth)
            finally:  # if interrupted, too: the late reply would be taken for the next question's
                if not reply:
                    self.stop()
            return reply == "equal\n"

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError), self._process:
                self._process.kill()
            self._process = None

    def _start(self) -> None:
        self.stop()
        # By path, since -m imports the package and torch with it; -P, since its folder is no place to import from.
        command = [sys.executable, "-P", __file__, str(MATH_VERIFY_SECONDS)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True)
        atexit.register(self.stop)
        if self._ask("7+7", "14") != "equal\n":
            raise RuntimeError(f"math-verify does not work here. See what `{sys.executable} -m pip check` says.")

    def _ask(self, answer: str, ground_truth: str) -> str:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # a broken pipe: it has just died
            print(json.dumps([answer, ground_truth]), file=self._process.stdin, flush=True)
            return self._process.stdout.readline()
        return ""


_workers: dict[int, _MathVerify] = {}


def _serve(seconds: float) -> None:
    """The process's program: answer each line of stdin, an answer and a ground truth, by a line on stdout."""
    from math_verify import LatexExtractionConfig, parse, verify

    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    limited = hasattr(signal, "setitimer")  # not on Windows, where an endless answer is waited for
    for question in sys.stdin:
        if limited:  # nobody handles this alarm, so the kernel ends the process, even inside one huge product
            signal.setitimer(signal.ITIMER_REAL, seconds)
        # Only LaTeX between `$`: in plain text math-verify picks the last number it finds, so `13 or 14` would be 14.
        answer, ground_truth = (
            parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in json.loads(question)
        )
        reply = "equal" if verify(ground_truth, answer, timeout_seconds=None) else "different"
        if limited:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
