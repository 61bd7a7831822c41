"""Tiny models and tokenizers built in process; real data where it lies beside the checkout."""

import functools
import os
import signal
from collections.abc import Iterator
from importlib.metadata import entry_points

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub; read when its client is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads only wait for each other; read when torch is imported

from pathlib import Path

import pytest
from support import browser as browser_module
from support.browser import Browser
from support.paths import SHARED_DATA

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins by ignoring it

_LONGEST = [
    "test_resume",
    "test_notebooks",
    "test_splits",
    "test_cli",
    "test_epochs",
    "test_run_folders",
    "test_module",
]
_LONGEST += ["test_lora_runs", "test_begun_on_two_processes", "test_public_templates", "test_encoded_rows"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: otherwise one of the two workers is left with one of them in the end."""
    items.sort(key=lambda item: [*_LONGEST, item.path.stem].index(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def _packages_are_looked_through_once() -> Iterator[None]:
    """Every trainer asks all installed packages for callbacks, which takes as long as a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.fabric.utilities.registry.entry_points", functools.cache(entry_points))
        yield


@pytest.fixture(scope="session", autouse=True)
def _launcher(_packages_are_looked_through_once: None) -> None:
    """What starts processes is a copy of this one before its first test."""
    from support import processes  # not in the process that hands out tests, which has no use for torch

    processes.begin()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep cached data sets out of the user's home."""
    cache = tmp_path_factory.getbasetemp() / "datasets_cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", cache / "downloads")


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` copy files from other file systems, of which the tests have one in memory."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A handler that is left behind would keep worker processes of later tests from being ended."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA.name} with real data is not beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser in which pages are tried."""
    if browser_module.EXECUTABLE is None:
        pytest.skip("no chromium or google-chrome on the PATH")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
