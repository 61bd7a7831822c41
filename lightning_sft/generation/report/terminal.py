"""Generation records in the terminal: what they add up to, and a few of them."""

from collections.abc import Mapping, Sequence

import rich
from lightning.pytorch.utilities import rank_zero_warn
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from lightning_sft.generation.records import GenerationRecord


def print_summary(step: int, summary: Mapping[str, float]) -> None:
    """One line on what the records of a step add up to, and how long generating them has taken."""
    names = ("answer_reward", "format_reward", "response_length", "response_entropy")
    parts = [f"{name} {summary[name]:.{1 if name == 'response_length' else 3}f}" for name in names]
    time_taken = f"{summary['generation_seconds']:.1f} s"
    if step and "generation_share" in summary:
        time_taken += f", generation has taken {summary['generation_share']:.0%} of the time"
    print(f"step {step}: {', '.join(parts)} ({time_taken})")


def print_test_result(summary: Mapping[str, float]) -> None:
    """One line with the share of correct responses and its interval."""
    print(
        f"{summary['num_correct']:.0f} of {summary['num_responses']:.0f} correct; answer_reward "
        f"{summary['answer_reward']:.4f}, 95% bootstrap interval "
        f"{summary['answer_reward_low']:.4f} to {summary['answer_reward_high']:.4f}"
    )


def warn_of_failures(records: Sequence[GenerationRecord]) -> None:
    """Warn if the reward function has failed, with the first response that it failed on."""
    failed = [record for record in records if record.reward_error is not None]
    if failed:
        rank_zero_warn(
            f"The reward function failed on {len(failed)} of {len(records)} examples, which count as 0. "
            f"The first: {failed[0].reward_error}, for the response {failed[0].response[:80]!r} "
            f"to the prompt {failed[0].prompt[-80:]!r}."
        )


def print_records(records: Sequence[GenerationRecord]) -> None:
    """A few records as a small table in the terminal; nothing where standard output is something else.

    Of a long prompt it has the end, of a long response the beginning.
    """
    console = rich.get_console()  # the progress bar's, which stays below
    if not console.is_terminal:
        return
    table = Table(box=HORIZONTALS, expand=True)
    for name, ratio in {"prompt": 2, "response": 3, "expected": None, "reward": None, "tokens": None}.items():
        table.add_column(name, ratio=ratio, no_wrap=ratio is None, overflow="fold")
    for record in records:
        colour = "" if record.answer_reward is None else "green" if record.is_correct else "red"
        table.add_row(
            Text(end(" ".join(record.prompt.split()), 80), style="dim"),
            Text(beginning(" ".join(record.response.split()), 160)),
            Text(beginning(record.ground_truth or "", 12)),
            Text("" if record.reward is None else f"{record.reward:g}", style=colour),
            Text(str(record.response_length)),
        )
    console.print(table)


def end(text: str, limit: int) -> str:
    """The last so many characters of a text."""
    return text if len(text) <= limit else "… " + text[-limit:]


def beginning(text: str, limit: int) -> str:
    """The first so many characters of a text."""
    return text if len(text) <= limit else text[:limit] + " …"
