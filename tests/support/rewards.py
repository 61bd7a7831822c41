"""What reward functions return, and how long they may take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st

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


anything = st.text() | st.lists(
    st.sampled_from([*r"{}\$%.,/:-+_^e'0123 x", r"\boxed{", r"\fbox", "1e", ",000", "\N{MINUS SIGN}", "\u0664"])
).map("".join)
