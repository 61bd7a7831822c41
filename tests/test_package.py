"""What is installed: a wheel with all that the package needs, and an sdist that builds the same one."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_sft

ROOT = Path(__file__).parents[1]
PROGRAM = """\
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_sft
from lightning_sft import (
    GenerationMonitor,
    GenerationRecord,
    HuggingFaceExport,
    LastCheckpoint,
    Sampling,
    SFTDataModule,
    SFTModule,
    StepProgressBar,
    TokenThroughput,
    compute_entropy,
    export_model,
    get_response_log_probs,
    log_generations,
    masked_normalize,
    r1_zero_reward,
    sft_loss,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)


def train(rows: list[dict[str, Any]]) -> SFTModule:
    data = SFTDataModule("model", rows, batch_size=32, max_tokens_per_microbatch=8192)
    module = SFTModule("model", max_grad_norm=1.0)
    callbacks: list[L.Callback] = [
        GenerationMonitor(every_n_steps=100, sampling=Sampling(temperature=0.8)),
        LastCheckpoint(),
        HuggingFaceExport(),
        StepProgressBar(),
        TokenThroughput(),
    ]
    L.Trainer(max_epochs=3, callbacks=callbacks).fit(module, data)
    return SFTModule.load_from_checkpoint("last.ckpt")


def step() -> Tensor:
    model = AutoModelForCausalLM.from_pretrained("model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    batch: dict[str, Tensor] = tokenize_prompt_and_output(["2 + 3 ="], [" 5"], tokenizer)
    found: dict[str, Tensor] = get_response_log_probs(model, batch["input_ids"], batch["labels"], True)
    total: Tensor = masked_normalize(found["log_probs"], batch["response_mask"], normalize_constant=2.0)
    entropy: Tensor = compute_entropy(torch.zeros(1, 2, 3))
    loss, facts = sft_microbatch_train_step(found["log_probs"], batch["response_mask"], 1)
    value: float = r1_zero_reward("</think> <answer> 5 </answer>", "5")["reward"]
    records, summary = log_generations(model, tokenizer, ["2 + 3 ="], ["5"], r1_zero_reward)
    first: GenerationRecord = records[0]
    mean: float = summary["reward"]
    export_model(model, "folder", tokenizer)
    print(first.response, mean, value, total, entropy, facts, lightning_sft.__version__)
    return loss
"""


def build(folder, target, out):
    words = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=60)


def contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_holds_code_types_pages_and_configs_and_the_sdist_builds_the_same(tmp_path):
    pytest.importorskip("hatchling")
    build(ROOT, "wheel", tmp_path)
    build(ROOT, "sdist", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    held = contents(wheel)
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "lightning_sft").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    configs = {f"lightning_sft/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert {
        "lightning_sft/py.typed",
        "lightning_sft/generation/report/pages/cards.html",
        "lightning_sft/generation/report/pages/step.js",
        "lightning_sft/generation/report/pages/tokens.js",
    } <= package
    assert {name for name in held if ".dist-info/" not in name} == package | configs

    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    folder = tmp_path / sdist.name.removesuffix(".tar.gz")
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "tests/conftest.py", "configs/gsm8k.yaml"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    build(folder, "wheel", tmp_path / "again")
    assert contents(tmp_path / "again" / wheel.name) == held


def test_the_changelog_has_this_version():
    assert f"\n## [{lightning_sft.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_strictly_typed_program_may_use_what_is_exported(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    words = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", str(program)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
