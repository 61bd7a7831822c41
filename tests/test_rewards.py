"""Rewards: formats and answers spelled by hand, hostile ones among them."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lightning_sft import rewards
from lightning_sft.rewards import REWARD_KEYS, checked_reward, exact_match_reward, r1_zero_reward

NO_FORMAT = {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}
WRONG = {"format_reward": 1.0, "answer_reward": 0.0, "reward": 0.0}
RIGHT = {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0}


def respond(answer: str) -> str:
    return f"7 and 7 make that. </think> <answer> {answer} </answer>"


@pytest.fixture
def short_limit(monkeypatch):
    """A worker of its own, with two seconds per question."""
    monkeypatch.setattr(rewards, "MATH_VERIFY_SECONDS", 2.0)
    monkeypatch.setattr(rewards, "_workers", {})
    yield
    for worker in rewards._workers.values():
        worker.stop()


@pytest.mark.parametrize(
    ("response", "expected"),
    [
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
    ],
)
def test_the_format_is_closed_reasoning_then_one_space_then_one_answer(response, expected):
    assert r1_zero_reward(response, "14") == expected


@pytest.mark.parametrize(
    ("answer", "ground_truth"),
    [
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
    ],
)
def test_answers_that_mean_the_ground_truth_are_right(answer, ground_truth):
    assert r1_zero_reward(respond(answer), ground_truth) == RIGHT


@pytest.mark.parametrize(
    ("answer", "ground_truth"),
    [
        # Listing guesses.
        ("13 or 14", "14"),
        ("14 or 13", "14"),
        ("13, 14, 15", "14"),
        ("$13$ $14$", "14"),
        ("14$ or $13", "14"),
        (r"\boxed{13} \boxed{14}", "14"),
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
    ],
)
def test_answers_that_mean_anything_else_are_wrong(answer, ground_truth):
    assert r1_zero_reward(respond(answer), ground_truth) == WRONG


def test_plain_numbers_and_equal_text_never_start_math_verify(monkeypatch):
    monkeypatch.setattr(rewards, "_workers", None)
    assert r1_zero_reward(respond(r"\frac{1}{2}"), r"$\frac{1}{2}$") == RIGHT
    assert r1_zero_reward(respond("1,234"), "1234") == RIGHT
    assert r1_zero_reward(respond("1,235"), "1234") == WRONG
    assert r1_zero_reward(respond("\N{MINUS SIGN}1,234"), "-1234.0") == RIGHT
    assert r1_zero_reward(respond(r"\boxed{\text{paris}}"), "Paris") == RIGHT
    assert r1_zero_reward(respond("Rome"), "Paris") == WRONG


def test_importing_the_module_imports_neither_math_verify_nor_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('rewards', {rewards.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print(sorted({'math_verify', 'sympy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_nothing_is_left_running_or_said_at_exit():
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('rewards', {rewards.__file__!r})\n"
        "rewards = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(rewards)\n"
        "print(rewards.r1_zero_reward('</think> <answer> 0.5 </answer>', '1/2')['reward'])"
    )
    ended = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("1.0\n", "")


def test_math_verify_answers_many_threads_each_its_own_question():
    def reward_of(number: int) -> dict[str, float]:
        assert threading.current_thread() is not threading.main_thread()
        return r1_zero_reward(respond(rf"\frac{{{number}}}{{7}}"), f"{number - number % 2}/7")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reward_of, range(1, 65))) == [WRONG, RIGHT] * 32


def test_math_verify_leaves_the_alarm_of_the_main_thread_alone():
    before = signal.getsignal(signal.SIGALRM)
    signal.alarm(100)
    try:
        assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT
        assert signal.alarm(0) > 90
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("bomb", ["9^{9^{9}}", "(10^9)!", "(" * 200 + "14" + ")" * 200])
def test_an_answer_that_would_never_end_is_wrong_and_the_next_one_is_judged_again(short_limit, bomb):
    start = time.monotonic()
    assert r1_zero_reward(respond(bomb), "14") == WRONG
    assert time.monotonic() - start < 20  # the limit, and the start of a process on a busy machine
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT


def test_a_worker_killed_from_outside_is_replaced(short_limit):
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT
    process = rewards._workers[os.getpid()]._process
    process.kill()
    process.wait()
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT
    assert rewards._workers[os.getpid()]._process.pid != process.pid


def test_an_answer_over_which_the_worker_dies_is_wrong_and_the_next_one_is_judged_again(short_limit, monkeypatch):
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT
    process = rewards._workers[os.getpid()]._process
    process.kill()
    process.wait()
    monkeypatch.setattr(process, "poll", lambda: None)
    assert r1_zero_reward(respond("0.5"), "1/2") == WRONG
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT


def test_an_interrupted_question_does_not_answer_the_next_one(short_limit, monkeypatch):
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT
    worker = rewards._workers[os.getpid()]

    def interrupted(answer, ground_truth):
        worker._process.stdin.write('["1", "2"]\n')
        worker._process.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        r1_zero_reward(respond("1"), r"\frac{4}{2}")
    monkeypatch.delattr(worker, "_ask")
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT


def test_an_idle_worker_is_kept(short_limit):
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT
    process = rewards._workers[os.getpid()]._process
    time.sleep(rewards.MATH_VERIFY_SECONDS + 0.5)
    assert process.poll() is None


def _send_reward(connection) -> None:
    connection.send(r1_zero_reward(respond("0.5"), "1/2"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, by which notebooks use several GPUs")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python >= 3.12: there are threads
def test_a_process_forked_while_a_question_is_open_does_not_wait_for_its_end(short_limit):
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT
    worker = rewards._workers[os.getpid()]
    with ThreadPoolExecutor(1) as pool:
        open_question = pool.submit(r1_zero_reward, respond("9^{9^{9}}"), "14")
        while not worker._lock.locked():
            time.sleep(0.01)
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_send_reward, args=(there,), daemon=True)
        child.start()
        assert here.poll(30)
        assert here.recv() == RIGHT
        child.join()
        assert child.exitcode == 0
        assert open_question.result() == WRONG
    assert r1_zero_reward(respond("0.5"), "1/2") == RIGHT


def test_a_broken_math_verify_raises_instead_of_judging_everything_wrong(short_limit, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="math-verify does not work here"):
        r1_zero_reward(respond("0.5"), "1/2")


def test_the_worker_takes_no_print_for_a_reply_and_imports_nothing_from_our_folder(short_limit, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text(
        "import sys\n"
        f"assert {os.path.dirname(rewards.__file__)!r} not in sys.path\n"
        "LatexExtractionConfig = dict\n"
        "def parse(text, configs, parsing_timeout): print('parsing'); return text\n"
        "def verify(gold, target, timeout_seconds): return (gold, target) == ('$14$', '$7+7$')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert r1_zero_reward(respond("9"), "[9]") == WRONG
    assert r1_zero_reward(respond("7+7"), "14") == RIGHT


@pytest.mark.parametrize(
    ("response", "ground_truth", "expected"),
    [
        ("14", "14", RIGHT),
        (" 14\n", "14 ", RIGHT),
        ("14.0", "14", WRONG),
        ("1,234", "1234", WRONG),
        ("Paris", "paris", WRONG),
        ("New  York", "New York", WRONG),
        ("</think> <answer> 14 </answer>", "14", WRONG),
        ("", "14", NO_FORMAT),
        (" \n", "14", NO_FORMAT),
        ("", "", NO_FORMAT),
    ],
)
def test_exact_match_compares_every_character_but_the_whitespace_around(response, ground_truth, expected):
    assert exact_match_reward(response, ground_truth) == expected


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
