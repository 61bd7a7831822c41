"""The SLURM job that a run belongs to: asked to run again, and found again when it does."""

import os
import subprocess
import warnings
from pathlib import Path

_FILE = "slurm_job.txt"


def write_slurm_job(run: Path) -> None:
    """Write beside a run which step of which job it is."""
    run.mkdir(parents=True, exist_ok=True)
    (run / _FILE).write_text(f"{_step()}\n", encoding="utf-8")


def is_restarted() -> bool:
    """Whether SLURM has started this job again: it was preempted, its machine failed, or `requeue_slurm_job` asked."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def is_of_this_step(run: Path) -> bool:
    """Whether the run in a folder is of the same step of the same job, when that was started before."""
    path = run / _FILE
    return path.is_file() and path.read_text(encoding="utf-8").strip() == _step()


def requeue_slurm_job() -> bool:
    """Ask SLURM to start this job again, and whether it will; of a job array only this one."""
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip()
        warnings.warn(f"SLURM does not restart job {name}: {why}. The run is saved and continues.", stacklevel=2)
        return False
    return True


def _step() -> str:
    """A script may start several runs; its steps, the calls of `srun`, are counted anew when the job is restarted."""
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', 'batch')}"
