"""Equality of answers, and the process in which math-verify runs: ended, killed, forked, interrupted."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_sft.rewards import answers
from lightning_sft.rewards.answers import equal


@pytest.fixture(scope="module")
def short_limit():
    """A worker for these tests, with two seconds per question; it takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "MATH_VERIFY_SECONDS", 2.0)
        patch.setattr(answers, "_workers", {})
        yield
        for worker in answers._workers.values():
            worker.stop()


@pytest.fixture
def new_worker(short_limit, monkeypatch):
    """A worker that is still to be started, for this test alone."""
    monkeypatch.setattr(answers, "_workers", {})
    yield
    for worker in answers._workers.values():
        worker.stop()


def test_plain_numbers_and_equal_text_never_start_math_verify(monkeypatch):
    monkeypatch.setattr(answers, "_workers", None)
    assert equal(r"\frac{1}{2}", r"$\frac{1}{2}$")
    assert equal("1,234", "1234")
    assert not equal("1,235", "1234")
    assert equal("\N{MINUS SIGN}1,234", "-1234.0")
    assert equal(r"\boxed{\text{paris}}", "Paris")
    assert not equal("Rome", "Paris")


def test_importing_the_module_imports_neither_math_verify_nor_torch():
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('answers', {answers.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print(sorted({'math_verify', 'sympy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_nothing_is_left_running_or_said_at_exit():
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('answers', {answers.__file__!r})\n"
        "answers = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(answers)\n"
        "print(answers.equal('0.5', '1/2'))"
    )
    ended = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_math_verify_answers_many_threads_each_its_own_question(short_limit):
    def is_equal(number: int) -> bool:
        assert threading.current_thread() is not threading.main_thread()
        return equal(rf"\frac{{{number}}}{{7}}", f"{number - number % 2}/7")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_equal, range(1, 65))) == [False, True] * 32


def test_math_verify_leaves_the_alarm_of_the_main_thread_alone(short_limit):
    before = signal.getsignal(signal.SIGALRM)
    signal.alarm(100)
    try:
        assert equal("0.5", "1/2")
        assert signal.alarm(0) > 90
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("bomb", ["9^{9^{9}}", "(" * 200 + "14" + ")" * 200])
def test_an_answer_that_would_never_end_is_wrong_and_the_next_one_is_judged_again(short_limit, bomb):
    start = time.monotonic()
    assert not equal(bomb, "14")
    assert time.monotonic() - start < 20  # the limit, and the start of a process on a busy machine
    assert equal("0.5", "1/2")


def test_a_worker_killed_from_outside_is_replaced(short_limit):
    assert equal("0.5", "1/2")
    process = answers._workers[os.getpid()]._process
    process.kill()
    process.wait()
    assert equal("0.5", "1/2")
    assert answers._workers[os.getpid()]._process.pid != process.pid


def test_an_answer_over_which_the_worker_dies_is_wrong_and_the_next_one_is_judged_again(short_limit, monkeypatch):
    assert equal("0.5", "1/2")
    process = answers._workers[os.getpid()]._process
    process.kill()
    process.wait()
    monkeypatch.setattr(process, "poll", lambda: None)
    assert not equal("0.5", "1/2")
    assert equal("0.5", "1/2")


def test_an_interrupted_question_does_not_answer_the_next_one(short_limit, monkeypatch):
    assert equal("0.5", "1/2")
    worker = answers._workers[os.getpid()]

    def interrupted(answer, ground_truth):
        worker._process.stdin.write('["1", "2"]\n')
        worker._process.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        equal("1", r"\frac{4}{2}")
    monkeypatch.delattr(worker, "_ask")
    assert equal("0.5", "1/2")


def test_an_idle_worker_is_kept(short_limit):
    assert equal("0.5", "1/2")
    process = answers._workers[os.getpid()]._process
    time.sleep(answers.MATH_VERIFY_SECONDS + 0.5)
    assert process.poll() is None


def _send_equality(connection) -> None:
    connection.send(equal("0.5", "1/2"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, by which notebooks use several GPUs")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python >= 3.12: there are threads
def test_a_process_forked_while_a_question_is_open_does_not_wait_for_its_end(short_limit):
    assert equal("0.5", "1/2")
    worker = answers._workers[os.getpid()]
    with ThreadPoolExecutor(1) as pool:
        open_question = pool.submit(equal, "9^{9^{9}}", "14")
        while not worker._lock.locked():
            time.sleep(0.01)
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_send_equality, args=(there,), daemon=True)
        child.start()
        assert here.poll(30)
        assert here.recv()
        child.join()
        assert child.exitcode == 0
        assert not open_question.result()
    assert equal("0.5", "1/2")


def test_a_broken_math_verify_raises_instead_of_judging_everything_wrong(new_worker, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="math-verify does not work here"):
        equal("0.5", "1/2")


def test_the_worker_takes_no_print_for_a_reply_and_imports_nothing_from_our_folder(new_worker, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text(
        "import sys\n"
        f"assert {os.path.dirname(answers.__file__)!r} not in sys.path\n"
        "LatexExtractionConfig = dict\n"
        "def parse(text, configs, parsing_timeout): print('parsing'); return text\n"
        "def verify(gold, target, timeout_seconds): return (gold, target) == ('$14$', '$7+7$')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not equal("9", "[9]")
    assert equal("7+7", "14")


def test_a_worker_may_take_longer_to_start_than_a_question_may(new_worker, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text(
        "import time\n"
        "LatexExtractionConfig, first = dict, [0.5]\n"
        "def parse(text, configs, parsing_timeout): time.sleep(first.pop() if first else 0); return text\n"
        "def verify(gold, target, timeout_seconds): return (gold, target) == ('$14$', '$7+7$')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(answers, "MATH_VERIFY_SECONDS", 0.25)
    assert equal("7+7", "14")
