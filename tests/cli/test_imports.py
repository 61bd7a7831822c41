"""What is imported when, which is most of the time before a command's first step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HELPERS = [
    "tokenize_prompt_and_output",
    "compute_entropy",
    "get_response_log_probs",
    "masked_normalize",
    "sft_microbatch_train_step",
    "log_generations",
    "r1_zero_reward",
]
NOT_FOR_HELPERS = ("lightning", "pytorch_lightning", "torchmetrics", "datasets")
# What only some runs use, or other commands: adapters, weights in 4 bits, rewards, loggers, `torch.compile`.
UNUSED = (
    "peft",
    "bitsandbytes",
    "math_verify",
    "mlflow",
    "wandb",
    "sklearn",
    "transformers.trainer_utils",
    "torch._inductor.compile_fx",
)
OF_OTHER_COMMANDS = ("lightning_sft.planning", "lightning_sft.results")
OF_CUDA = () if torch.backends.cuda.is_built() else ("torch.nn.attention.varlen",)
QUICKSTART = {
    "trainer.max_steps": 1,
    "data.train_data.init_args.num_rows": 100,
    "data.val_data.init_args.num_rows": 4,
    "generation.num_prompts": 4,
}
COMMANDS = [["--help"], ["--config", "quickstart", *(f"--{name}={value}" for name, value in QUICKSTART.items())]]
PROGRAM = f"""\
import gc, sys

def check(what, names):
    brought = [name for name in names if name in sys.modules]
    assert not brought, (what, brought)

import lightning_sft
from adapters import run_get_response_log_probs, run_tokenize_prompt_and_output
check("adapters", {NOT_FOR_HELPERS})
for name in {HELPERS}:
    getattr(lightning_sft, name)
    check(name, {NOT_FOR_HELPERS})

import lightning_sft.cli.app
check("the command line", {UNUSED + OF_OTHER_COMMANDS + OF_CUDA})

import torch
for name in lightning_sft.__all__:
    getattr(lightning_sft, name)
    check(name, {UNUSED})
assert not torch.cuda.is_initialized()

from lightning_sft.cli.main import main
for words in {COMMANDS}:
    sys.argv[1:] = ["fit", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code
    check(words, {UNUSED})
    assert "datasets" in sys.modules and gc.isenabled()
"""


def test_nothing_is_imported_that_is_not_used(tmp_path):
    """By the course's helpers, also as its later chapters take them; the command line; all public names; `fit`."""
    env = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(program, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--model.loss_normalization" in done.stdout
    assert "leaked" not in done.stderr  # as triton would say of what is not freed at the exit


@pytest.mark.parametrize(
    ("given", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_are_told_to_sleep_before_torch_is_imported_unless_the_user_has_decided(given, count):
    """By default they keep a core busy on which another program, or the thread that they wait for, could run."""
    program = """\
import os, sys
from lightning_sft.cli import main
main._imported = lambda: lambda: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
sys.argv[1:] = ["fit"]
main.main()
"""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], env=env | given, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [count, "False"], done.stderr
