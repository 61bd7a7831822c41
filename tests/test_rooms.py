"""The rooms of the package: imports run one way, and importing does nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_sft
from lightning_sft.cli.main import SUMMARIES, overview

TESTS = Path(__file__).parent
HELPERS = [
    "tokenize_prompt_and_output",
    "compute_entropy",
    "get_response_log_probs",
    "masked_normalize",
    "sft_microbatch_train_step",
    "log_generations",
    "r1_zero_reward",
]


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_imports_run_one_way():
    """The contract is in pyproject.toml."""
    pytest.importorskip("importlinter")
    subprocess.run(["lint-imports"], check=True, timeout=120)


def test_importing_starts_no_device_and_no_verifier():
    run(
        "import sys, torch, lightning_sft\n"
        "for name in lightning_sft.__all__:\n"
        "    getattr(lightning_sft, name)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'math_verify' not in sys.modules\n"
    )


def test_every_public_name_can_be_imported_and_listed():
    assert set(lightning_sft.__all__) <= set(dir(lightning_sft))
    assert all(getattr(lightning_sft, name).__name__ == name for name in lightning_sft.__all__)


@pytest.mark.parametrize("name", ["lightning_sft.no_such_name", "lightning_sft.Sampler"])
def test_a_name_that_is_not_there_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(lightning_sft, name.rpartition(".")[2])


def test_neither_helpers_nor_what_the_course_s_later_chapters_take_from_the_adapters_bring_lightning_or_datasets():
    run(
        "import sys, lightning_sft\n"
        "def check(name):\n"
        "    brought = {'lightning', 'pytorch_lightning', 'torchmetrics', 'datasets'} & set(sys.modules)\n"
        "    assert not brought, (name, brought)\n"
        f"sys.path.insert(0, {str(TESTS)!r})\n"
        "from adapters import run_get_response_log_probs, run_tokenize_prompt_and_output\n"
        "check('adapters')\n"
        f"for name in {HELPERS}:\n"
        "    getattr(lightning_sft, name)\n"
        "    check(name)\n"
    )


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
