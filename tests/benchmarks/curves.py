"""Curves of several runs, one above the other: rewards, loss and entropy over optimizer steps.

python tests/benchmarks/curves.py "all weights"=runs/stories/version_0 LoRA=runs/stories/version_1 --output curves.png
"""

import argparse
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {
    "val/answer_reward": "answer reward",
    "val/loss": "validation loss, nats per token",
    "val/response_entropy": "entropy of responses, nats per token",
}


def read_curves(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Optimizer steps and values of each panel that a run has logged to TensorBoard."""
    events = EventAccumulator(str(run)).Reload()
    found = {name: events.Scalars(name) for name in PANELS if name in events.Tags()["scalars"]}
    return {name: ([each.step for each in curve], [each.value for each in curve]) for name, curve in found.items()}


def plot(runs: dict[str, Path], output: Path) -> None:
    """Draw a panel for each value and a line for each run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.2), layout="constrained")
    for label, run in runs.items():
        curves = read_curves(run)
        for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
            if name in curves:
                axis.plot(*curves[name], marker=".", label=label)
            axis.set(title=title, xlabel="optimizer steps")
            axis.set_yscale("log" if "loss" in name else "linear")
    axes[0].legend()
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="folder with TensorBoard's events")
    parser.add_argument("--output", type=Path, required=True, help="a PNG")
    options = parser.parse_args()
    plot({label: Path(run) for label, _, run in (each.partition("=") for each in options.runs)}, options.output)


if __name__ == "__main__":
    main()
