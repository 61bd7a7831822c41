"""Signals that are noted now and obeyed later, when a run can be left without losing anything."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

_Handler = Callable[[int, FrameType | None], object] | int | None


class DeferredSignals:
    """Notes signals instead of letting them end the process. A second Ctrl-C is obeyed at once.

    Attributes:
        received: The last signal that came; None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._earlier: dict[signal.Signals, _Handler] = {}

    def catch(self, numbers: Iterable[signal.Signals]) -> None:
        """Take over from the present handlers. Only the main thread can; elsewhere nothing changes."""
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in numbers}

    def release(self) -> None:
        """Give the handlers back."""
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier = {}

    def hand_on(self, number: signal.Signals) -> None:
        """Let the handler act that was there before."""
        self.received = None
        handler = self._earlier.get(number)
        if callable(handler):
            handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            self.release()
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
