"""The rooms of the package: imports run one way, and importing does nothing else."""

import subprocess
import sys

import pytest

import lightning_sft
from lightning_sft.cli.main import SUMMARIES, overview


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_imports_run_one_way():
    """The contract is in pyproject.toml."""
    pytest.importorskip("importlinter")
    subprocess.run(["lint-imports"], check=True, timeout=120)


def test_every_public_name_can_be_imported_and_listed():
    assert set(lightning_sft.__all__) <= set(dir(lightning_sft))
    assert all(getattr(lightning_sft, name).__name__ == name for name in lightning_sft.__all__)


@pytest.mark.parametrize("name", ["lightning_sft.no_such_name", "lightning_sft.Sampler"])
def test_a_name_that_is_not_there_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(lightning_sft, name.rpartition(".")[2])


@pytest.mark.parametrize("flag", ["--version", "--help", "-h", None])
def test_version_and_overview_are_answered_without_torch(flag):
    run(
        "import sys\n"
        f"sys.argv = ['lightning-sft', *filter(None, [{flag!r}])]\n"
        "from lightning_sft.cli.main import main\n"
        "main()\n"
        "assert not {'torch', 'transformers', 'lightning', 'jsonargparse'} & set(sys.modules)\n"
    )


def test_the_overview_names_every_command():
    from lightning_sft.cli.commands import COMMANDS

    assert COMMANDS.keys() == SUMMARIES.keys()
    assert all(f"  {name} " in overview() for name in COMMANDS)
