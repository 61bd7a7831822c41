"""Whether two answers are equal: as text, as plain numbers, or by math-verify.

math-verify runs in a process of its own. It limits its time by SIGALRM, which works in the main thread only (elsewhere
it raises); without that limit, one answer such as `9^{9^{9}}` or many nested parentheses stops a whole training job.
A process can be ended from any thread. It starts when two answers are neither equal as text nor plain numbers.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from decimal import Decimal

MATH_VERIFY_SECONDS = 5.0  # per pair of answers; an ordinary one takes a hundredth
NUMBER = r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,9})?"

_NUMBER = re.compile(NUMBER)
_WORDS = re.compile(r"no|(?=[a-z' ]*[a-z]{3})[a-z' ]*", re.IGNORECASE)  # `xy` may be a product
_OPENING = re.compile(r"(?:\\(?:boxed|fbox|text)\{|\\\[) ?")
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_TWO_NUMBERS = re.compile(r"\d \d")


def equal(answer: str, ground_truth: str) -> bool:
    """Whether the two mean the same, by the rules of `r1_zero_reward`; nothing equals an empty one.

    Raises:
        RuntimeError: math-verify is missing or broken.
    """
    answer, ground_truth = normalized(answer), normalized(ground_truth)
    if not answer or not ground_truth:
        return False
    if answer == ground_truth:
        return True
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(ground_truth):
        return value(answer) == value(ground_truth)
    if _WORDS.fullmatch(ground_truth):  # math-verify takes a word for the product of its letters: Paris = pairs
        return answer.casefold() == ground_truth.casefold()
    if _TWO_NUMBERS.search(answer) or _TWO_NUMBERS.search(ground_truth):  # math-verify adds them up: 10 4 = 14
        return False
    # math-verify would look into the boxes alone: `13 \boxed{14}` = 14
    answer, ground_truth = _BOX.sub("", answer), _BOX.sub("", ground_truth)
    # By process id: a fork must share neither its parent's pipe nor a lock that another thread holds.
    return _workers.setdefault(os.getpid(), _MathVerify()).equal(answer, ground_truth)


def normalized(text: str) -> str:
    r"""The text without what does not count in an answer: `$`, a final full stop, a `\boxed{}` around the whole..."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "").replace("$", "")
    text = " ".join(text.split()).removesuffix(".")
    start, end = 0, len(text)
    while opening := _OPENING.match(text, start, end):
        closing = r"\]" if "[" in opening[0] else "}"
        if not text.endswith(closing, opening.end(), end):
            break
        start, end = opening.end(), end - len(closing)
        end -= text.endswith(" ", start, end)
    return text[start:end]


def value(number: str) -> Decimal:
    """The value, exactly, of a text that matches `NUMBER`."""
    return Decimal(number.replace(",", ""))


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
    limited = False  # the first question is our own, and waits for imports, which take long on a busy machine
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
        limited = hasattr(signal, "setitimer")  # not on Windows, where an endless answer is waited for


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
