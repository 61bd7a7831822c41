"""A function that hangs, whatever it hangs in, and what it leaves behind."""

import re
import signal
import threading
import time

import pytest

from lightning_sft.rewards.time_limit import TimeLimitError, call_within

SECONDS = 0.2
needs_alarms = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no alarms on this system")


def sleeps():
    time.sleep(60)


def waits_for_a_lock():
    threading.Event().wait(60)


def counts():
    while True:
        pass


def matches():
    re.match(r"(a+)+$", "a" * 60 + "b")  # the interpreter's lock is held all along


def catches_exceptions():
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def catches_everything_twice():
    for _ in range(2):
        try:
            counts()
        except BaseException:
            continue
    counts()


def in_a_thread(function, *args):
    outcome = []

    def run():
        try:
            outcome.append(function(*args))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return outcome[0]


@needs_alarms
@pytest.mark.parametrize(
    "hangs", [sleeps, waits_for_a_lock, counts, matches, catches_exceptions, catches_everything_twice]
)
def test_whatever_a_function_hangs_in_it_is_stopped(hangs):
    start = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"^it took longer than 0\.2 s$"):
        call_within(SECONDS, hangs)
    assert time.monotonic() - start < 10


def counts_for_a_while():  # nothing can end it, and it would take its time from later tests
    end = time.monotonic() + 3
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize("hangs", [sleeps, counts_for_a_while])
def test_outside_the_main_thread_a_hanging_function_is_left_behind(hangs):
    start = time.monotonic()
    assert isinstance(in_a_thread(call_within, SECONDS, hangs), TimeLimitError)
    assert time.monotonic() - start < 2.5


@pytest.mark.parametrize("seconds", [None, 5])
def test_a_function_in_time_returns_or_raises_as_ever(seconds):
    assert call_within(seconds, max, 3, 4) == 4
    with pytest.raises(ValueError, match="invalid literal"):
        call_within(seconds, int, "x")
    assert in_a_thread(call_within, seconds, max, 3, 4) == 4
    assert isinstance(in_a_thread(call_within, seconds, int, "x"), ValueError)


def test_a_time_out_of_the_function_itself_is_its_own():
    def fails():
        raise TimeoutError("the server is away")

    with pytest.raises(TimeoutError, match="the server is away") as caught:
        call_within(5, fails)
    assert caught.type is TimeoutError


@needs_alarms
def test_no_alarm_is_left_and_the_handler_is_back():
    before = signal.getsignal(signal.SIGALRM)
    call_within(5, max, 3, 4)
    with pytest.raises(TimeLimitError):
        call_within(SECONDS, sleeps)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


@needs_alarms
def test_an_alarm_that_was_set_before_rings_at_its_time_or_right_after():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        call_within(5, time.sleep, 0.05)
        assert 99 < signal.getitimer(signal.ITIMER_REAL)[0] < 100
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        call_within(5, time.sleep, 0.2)
        time.sleep(0.2)
        assert len(rung) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
