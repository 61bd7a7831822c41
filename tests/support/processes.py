"""Processes that begin with everything imported: each is a fork, which takes milliseconds, where imports take seconds.

They are forked by a process that is itself a fork of pytest's, made before the first test: nothing that a test has done
is in them.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import warnings
from multiprocessing.connection import Connection
from typing import Any

from torch.distributed import TCPStore

# Imported in a fit. The second brings peft, bitsandbytes and with these torch's compiler.
_IMPORTED_FIRST = ("lightning_sft.cli.app", "transformers.optimization")
_launchers: list["_Launcher"] = []


def begin() -> None:
    """To be called once, before the first test."""
    _launchers.append(_Launcher())


class _Launcher:
    """Asks the process that forks others; it ends when this one does."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # what is there stays; looking at it would copy the pages of memory that forks share
        self._pipe, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has a thread, which waits for messages
            if os.fork() == 0:
                self._pipe.close()
                _launch(theirs)
                os._exit(0)
        theirs.close()

    def start(self, environment: dict[str, Any], function: Any, args: Any, kwargs: Any) -> int:
        """Returns the number of the process."""
        self._pipe.send(("start", environment, pickle.dumps((function, args, kwargs))))
        return self._pipe.recv()

    def exit_code(self, pid: int, timeout: float) -> int | None:
        """Waits so many seconds at most; None while the process runs."""
        self._pipe.send(("exit code", pid, timeout))
        return self._pipe.recv()


def _launch(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for pytest, which ends the pipe
    warnings.resetwarnings()  # pytest has made them errors
    processes = {}
    with contextlib.suppress(EOFError):
        while True:
            request, first, second = pipe.recv()
            if request == "start":
                for name in _IMPORTED_FIRST:
                    importlib.import_module(name)
                process = multiprocessing.get_context("fork").Process(target=_call, args=(first, second))
                process.start()
                processes[process.pid] = process
                pipe.send(process.pid)
            else:
                processes[first].join(second)
                pipe.send(processes[first].exitcode)


def _call(environment: dict[str, Any], pickled: bytes) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # for its workers, as in a process that a user starts
    os.environ.update({name: str(value) for name, value in environment.items()})
    function, args, kwargs = pickle.loads(pickled)
    function(*args, **kwargs)


class Processes:
    """The same function in one process for each rank, as a launcher would start them; on loopback only."""

    def __init__(self, function: Any, *args: Any, world_size: int = 1, **kwargs: Any) -> None:
        (self._launcher,) = _launchers
        environment = self._common_environment(world_size) if world_size > 1 else {}
        self.pids = []
        for rank in range(world_size):
            own = {"RANK": rank, "LOCAL_RANK": rank} if world_size > 1 else {}
            self.pids.append(self._launcher.start(environment | own, function, args, kwargs))

    def _common_environment(self, world_size: int) -> dict[str, Any]:
        """Says that a launcher is there already, and where they meet: a process that came too early would wait."""
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "GROUP_RANK": 0}
        environment |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        return environment | {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True}

    def all_run(self) -> bool:
        return all(self._launcher.exit_code(pid, timeout=0) is None for pid in self.pids)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit codes; whoever is late is ended."""
        for pid in self.pids:
            self._launcher.exit_code(pid, timeout)
        return self.kill()

    def kill(self) -> list[int | None]:
        """At once, their workers too: each leads a group of its own. Returns the exit codes."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        return [self._launcher.exit_code(pid, timeout=60) for pid in self.pids]
