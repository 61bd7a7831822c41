"""What a command imports, which is most of the time before its first step."""

import os
import subprocess
import sys

import pytest

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
PROGRAM = f"""\
import gc, sys
from lightning_sft.cli.main import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
brought = [name for name in {UNUSED} if name in sys.modules]
assert not brought, brought
assert "datasets" in sys.modules and gc.isenabled()
"""
QUICKSTART = {
    "trainer.max_steps": 1,
    "data.train_data.init_args.num_rows": 100,
    "data.val_data.init_args.num_rows": 4,
    "generation.num_prompts": 4,
}


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--config", "quickstart", *(f"--{name}={value}" for name, value in QUICKSTART.items())]],
    ids=["help", "quickstart"],
)
def test_fit_imports_nothing_that_it_does_not_use(words, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    program = [sys.executable, "-c", PROGRAM, "fit", *words]
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
