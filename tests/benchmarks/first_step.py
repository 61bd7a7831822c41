"""Processor time of the quickstart until its first optimizer step, of one version or of several in turn.

    python tests/benchmarks/first_step.py --checkouts . ../earlier --rounds 7

A round before the first, which is not counted, compiles the modules of each checkout and fills its cache of rows.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import machine, table

_PROGRAM = """\
import gc, os, sys, time
gc.disable()  # as the program does while it imports
import lightning
imported = time.process_time()
from torch.optim.optimizer import register_optimizer_step_post_hook

def stop(*_):
    print("seconds", imported, time.process_time() - imported, flush=True)
    os._exit(0)

register_optimizer_step_post_hook(stop)
sys.argv[1:] = ["fit", "--config", "quickstart"]
from lightning_sft.cli.main import main
main()
"""


def run(checkout: Path, folder: str, program: list[str]) -> tuple[str, float]:
    """What a program of a checkout prints, and its processor seconds."""
    env = os.environ | {"PYTHONPATH": str(checkout.absolute()), "HF_DATASETS_CACHE": f"{folder}/cache"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *program], cwd=folder, env=env, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(checkout: Path, folder: str) -> list[float]:
    """Seconds of `import lightning`, of all else until the first step, and of `fit --help`."""
    printed, _ = run(checkout, folder, ["-c", _PROGRAM])
    found = next(line.split()[1:] for line in printed.splitlines() if line.startswith("seconds "))
    _, for_help = run(checkout, folder, ["-m", "lightning_sft", "fit", "--help"])
    return [*map(float, found), for_help]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[Path()], help="folders with a version each")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(machine("cpu"), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        folders = {checkout: str(Path(folder, str(index))) for index, checkout in enumerate(options.checkouts)}
        for each in folders.values():
            Path(each).mkdir()
        rounds = [{path: measure(path, at) for path, at in folders.items()} for _ in range(1 + options.rounds)]
    rows = []
    for path in options.checkouts:
        columns = zip(*(each[path] for each in rounds[1:]), strict=True)
        rows.append([str(path), *(f"{statistics.median(seconds):.2f} s" for seconds in columns)])
    print(table(["", "`import lightning`", "all else until the first step", "`fit --help`"], rows))


if __name__ == "__main__":
    main()
