"""Folders that a run makes for itself early, so that no run which begins at the same time gets them."""

import contextlib
import os
import re
from pathlib import Path


class ClaimedFolders:
    """The numbered folders of a run, one for each of its loggers that numbers them.

    Loggers look for a free number when a run begins, but make the folder only after the data has been read, which may
    take minutes. Runs that are started together, such as those of a job array, would all find the same number.
    """

    def __init__(self) -> None:
        self._made: list[Path] = []

    def claim(self, runs: Path) -> int | None:
        """Make `version_<N>` for the next number N in a folder of runs, and return N.

        None, and nothing is made, in any but the first process of a run, which writes nothing there; and where no
        folder can be made, which is refused later.
        """
        if _is_first_process():
            with contextlib.suppress(OSError):
                return self._make_next(runs)
        return None

    def _make_next(self, runs: Path) -> int:
        missing = [folder for folder in (runs, *runs.parents) if not folder.exists()]
        runs.mkdir(parents=True, exist_ok=True)
        names = (re.fullmatch(r"version_(\d+)", path.name) for path in runs.iterdir())
        number = 1 + max((int(name[1]) for name in names if name), default=-1)
        while True:
            folder = runs / f"version_{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                self._made += [folder, *missing]
                return number

    def remove_unused(self) -> None:
        """Remove what is empty again, of a command that was refused."""
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _is_first_process() -> bool:
    """Before there is a trainer: launchers set these, Lightning's own and `torchrun` the number of the machine.

    They are read now: Lightning reads them when it is imported, which a process that is forked from another was not.
    """
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    machine = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return next((rank for rank in ranks if rank is not None), "0") == machine == "0"
