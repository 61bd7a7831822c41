"""The program `lightning-sft`: `--version` and the overview of commands are answered before imports that take long."""

import gc
import os
import sys
from collections.abc import Callable
from importlib.metadata import version

SUMMARIES = {  # of the commands, for the overview and for each command's own help
    "fit": "Train a model; without arguments, run the quickstart.",
    "validate": "Evaluate a checkpoint on the validation rows.",
    "test": "Evaluate a checkpoint on the test rows, and answer all of their prompts.",
    "predict": "Write responses to prompts to a file.",
    "inspect": "Compute the loss of each row, and write a page with the highest loss first.",
    "preview": "Show some training rows as the model will see them, and statistics of the data.",
    "estimate": "Estimate the memory and time that `fit` would need.",
    "find_lr": "Try rising learning rates, and suggest one.",
    "find_batch_size": "Try how many tokens per microbatch fit into memory.",
    "compare": "Compare runs, or steps of one run, on a page.",
    "best_responses": "Write a model's best responses as rows to train on.",
    "export": "Export a checkpoint's model to a folder that `from_pretrained` loads.",
}


def main() -> None:
    """Entry point."""
    words = sys.argv[1:]
    if words[:1] == ["--version"]:
        print(f"lightning-sft {version('lightning-sft')}")
    elif not words or words[0] in ("--help", "-h"):
        print(overview())
    elif words[0] not in SUMMARIES:
        print(f"lightning-sft: error: `{words[0]}` is not a command; see `lightning-sft --help`.", file=sys.stderr)
        sys.exit(2)
    else:
        _let_threads_sleep()
        run = _imported()
        try:
            run()
        finally:
            if "triton" in sys.modules:  # which lists at the exit, on the terminal, what has not been freed by then
                gc.unfreeze()


def _let_threads_sleep() -> None:
    """Let OpenMP's threads sleep after they have waited for one another for a thousand turns of a loop.

    By default they go on for 300,000 turns and keep cores busy that the thread they wait for could use, or another
    program: beside one, a step takes several times as long. The variable is read when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _imported() -> Callable[[], None]:
    """Import what runs a command, which takes seconds, without the garbage collector.

    Imports make hundreds of thousands of objects, which stay until the end. The collector would go through all of them
    again and again, which is a fifth of the time here and takes more while a model is trained; it skips frozen ones.
    """
    gc.disable()
    from lightning_sft.cli.app import main as run

    gc.freeze()
    gc.enable()
    return run


def overview() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<17}{text}" for name, text in SUMMARIES.items()]
    return "\n".join(
        [
            "usage: lightning-sft COMMAND [--config NAME_OR_FILE] [--SETTING VALUE ...]",
            "",
            "Supervised fine-tuning of causal language models.",
            "",
            "commands:",
            *lines,
            "",
            "Settings are explained by `lightning-sft COMMAND --help`.",
        ]
    )
