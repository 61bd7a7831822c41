"""What the README tells a newcomer to type works."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.models import character_tokenizer, tiny_model

from lightning_sft.cli.app import build

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    "lightning-sft" + re.split("lightning-sft|-m lightning_sft", line.split("#")[0])[1].rstrip()  # without a launcher
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if re.search("lightning-sft|-m lightning_sft", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_accepted(command, monkeypatch, tmp_path):
    program, *words = shlex.split(command)
    assert program == "lightning-sft"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program])
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    run_config = tmp_path / "runs/gsm8k/version_0/config.yaml"  # as a finished run would have left it
    run_config.parent.mkdir(parents=True)
    run_config.write_text((ROOT / "configs/gsm8k.yaml").read_text())
    with pytest.raises(SystemExit) as exit_info:
        build([*words, "--print_config"] if "--help" not in words else words)
    assert not exit_info.value.code


def test_the_readme_has_the_commands_that_set_everything_up():
    assert "pip install -e . && lightning-sft fit --config configs/quickstart.yaml" in README
    assert "pip install -e '.[dev]' && pytest" in README
    assert len(COMMANDS) >= 6


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(1)
    tiny_model().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    assert code.count('"Qwen/Qwen2.5-0.5B"') == 2
    code = code.replace("Qwen/Qwen2.5-0.5B", str(tmp_path / "model"))
    code = code.replace(
        "L.Trainer(",
        "L.Trainer(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False, ",
    )
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "step 0: answer_reward 0.000" in capsys.readouterr().out
    assert (tmp_path / "checkpoints").is_dir()


@pytest.mark.slow
def test_the_quickstart_learns(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sft"])
    torch.set_num_threads(2)
    cli = build(
        ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.enable_progress_bar", "false"]
    )
    assert cli.trainer.callback_metrics["val/answer_reward"] >= 0.95
