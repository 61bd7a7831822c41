"""Every causal language model of the installed `transformers`, tiny, against each row alone through the plain model."""

import argparse
import sys
from collections import Counter
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.architectures import MODEL_TYPES
from support.sweep import Verdict, examine_apart

_STATES = {"agrees": "agree with the plain model", "refused": "are refused", "not built": "cannot be built"}


def table(verdicts: list[Verdict]) -> str:
    """The table in Markdown, with a sum of it before."""
    states = Counter(verdict.state for verdict in verdicts)
    packed = sum(verdict.layout == "packed" and verdict.state == "agrees" for verdict in verdicts)
    linear = sum(verdict.head.startswith("linear") and verdict.state == "agrees" for verdict in verdicts)
    lines = [
        "# Every architecture",
        "",
        "Written by `python tests/benchmarks/architectures.py --write tests/benchmarks/architectures.md`;",
        "[README.md](README.md#architectures) says what is compared.",
        "",
        f"{len(verdicts)} types of `transformers` {transformers.__version__}: "
        + ", ".join(f"{number} {_STATES.get(state, state)}" for state, number in states.most_common())
        + f". Of those that agree, {packed} are trained on packed rows, and {linear} have a linear head, whose logits "
        "are never stored as a whole.",
        "",
        "| type | state | layout | head | largest error | why padded, refused or not built |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for verdict in verdicts:
        layout, _, why = verdict.layout.partition(": ")
        words = (verdict.refusal.partition(": ")[2] or why).replace("|", "\\|").replace("\n", " ")
        error = f"{max(verdict.errors.values()):.0e}" if verdict.errors else ""
        lines.append(
            f"| {verdict.model_type} | {verdict.state} | {layout} | {verdict.head} | {error} | {words[:240]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", default=MODEL_TYPES, help="Default: all.")
    parser.add_argument("--write", type=Path, help="A Markdown file for the table.")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    verdicts = []
    for model_type in arguments.types:
        verdicts.append(verdict := examine_apart(model_type))
        errors = {name: f"{error:.0e}" for name, error in verdict.errors.items()}
        words = verdict.refusal or f"{verdict.state}: {verdict.layout}; {verdict.head}; {errors}"
        print(f"{model_type}: {words[:300]}", flush=True)
    if arguments.write:
        arguments.write.write_text(table(verdicts))


if __name__ == "__main__":
    main()
