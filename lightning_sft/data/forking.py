"""Processes that are forked from this one."""

import gc


def collect_before_forking(num_processes: int) -> None:
    """Leave no garbage to processes that are about to be forked.

    A tensor on a CUDA device that waits for the garbage collector would be freed in the new process, which cannot use
    the device and would die of it.
    """
    if num_processes:
        gc.collect()
