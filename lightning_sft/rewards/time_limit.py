"""A time limit for other people's functions."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class TimeLimitError(TimeoutError):
    """A function took longer than it may."""


class _TimeIsUp(BaseException):
    """Raised inside the function; no `Exception`, so that its own `except Exception` lets it pass."""


def call_within(seconds: float | None, function: Callable[..., T], *args: object) -> T:
    """Call a function and give up waiting for it when its time is up.

    In the main thread the kernel's alarm interrupts the function, also inside a regular expression or a sleep; an alarm
    that was set before still rings, at its time or right after. A function that sets an alarm of its own takes the
    limit off itself. Elsewhere, and where there are no alarms, the function runs in a thread of its own, which nothing
    can end: when the time is up it is left behind, and goes on beside the caller until it returns or the program ends.

    Without `seconds` there is no limit.

    Raises:
        TimeLimitError: It took longer. What else it raises is passed on.
    """
    if seconds is None:
        return function(*args)
    try:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            return _call_under_alarm(seconds, function, *args)
        return _call_in_thread(seconds, function, *args)
    except _TimeIsUp:
        raise TimeLimitError(f"it took longer than {seconds:g} s") from None


def _call_under_alarm(seconds: float, function: Callable[..., T], *args: object) -> T:
    running = True

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        if running:
            raise _TimeIsUp

    start, handler = time.monotonic(), signal.signal(signal.SIGALRM, interrupt)
    # Again and again, for a function that catches everything and goes on.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, min(seconds, 1.0))
    try:
        return function(*args)
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


def _call_in_thread(seconds: float, function: Callable[..., T], *args: object) -> T:
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001, it is raised again below, where somebody listens
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="call_within").start()
    if wait([outcome], timeout=seconds).not_done:
        raise _TimeIsUp
    return outcome.result()
