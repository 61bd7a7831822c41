"""What the READMEs tell a newcomer to type works, and what they point at is there."""

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from support.models import character_tokenizer, tiny_model
from support.paths import ROOT

from lightning_sft import SFTDataModule
from lightning_sft.cli.app import run_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = ["README.md", "CONTRIBUTING.md", "configs/README.md", "notebooks/README.md", "tests/benchmarks/README.md"]
PROGRAM = "lightning-sft|-m lightning_sft"  # also behind a launcher
COMMANDS = {
    "lightning-sft" + re.split(PROGRAM, line.split(" #")[0])[1].rstrip(): None  # once each, in order
    for name in READMES
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if re.search(PROGRAM, line)
}
REWARDS = ("format_reward", "answer_reward", "reward")
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def own_file(name: str, readme: str = README) -> str:
    """A README's file of Python, such as `rewards.py`."""
    (code,) = re.findall(rf"```python\n(# {name}\n.*?)```", readme, re.DOTALL)
    return code


OWN_FILES = {
    "rewards.py": own_file("rewards.py"),
    "losses.py": own_file("losses.py", (ROOT / "configs/README.md").read_text(encoding="utf-8")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readmes_is_accepted(command, monkeypatch, tmp_path):
    program, *words = shlex.split(command)
    assert program == "lightning-sft"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [program])
    for name, code in OWN_FILES.items():
        (tmp_path / name).write_text(code)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("gsm8k", "quickstart"):
        run_config = tmp_path / f"runs/{name}/version_0/config.yaml"  # as a finished run would have left it
        run_config.parent.mkdir(parents=True)
        run_config.write_text((ROOT / f"configs/{name}.yaml").read_text())
    with pytest.raises(SystemExit) as exit_info:
        run_command([*words, "--print_config"] if "--help" not in words else words)
    assert not exit_info.value.code


def test_settings_that_have_other_names_elsewhere_exist_here(capsys):
    text = (ROOT / "configs/README.md").read_text(encoding="utf-8").partition("names of other trainers\n")[2]
    here = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = {name for cell in here for name in re.findall(r"`([a-z_]+\.[a-z_.]+|ckpt_path)", cell)}
    assert len(names) > 20
    with pytest.raises(SystemExit):
        run_command(["fit", "--help"])
    shown = set(re.findall(r"--([\w.]+)", capsys.readouterr().out))
    assert names - shown == {"model.optimizer.lr", "model.lora.path"}  # arguments of what these settings hold


def test_the_readme_is_short_and_begins_with_what_sets_everything_up():
    assert len(README.splitlines()) <= 150
    assert "pip install -e . && lightning-sft fit --config configs/quickstart.yaml" in README
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        path, _, heading = target.partition("#")
        found = (ROOT / name).parent / path
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in headings], target


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path, capsys):
    code = next(code for code in blocks("python") if "trainer.fit" in code)
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


def test_the_rows_of_the_readme_are_rows_and_the_assistants_words_are_learnt(tmp_path):
    (code,) = blocks("json")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    learnt = []
    for line in code.splitlines():
        path = tmp_path / "row.jsonl"
        path.write_text(line)
        data = SFTDataModule(tokenizer, str(path), layout="padded")
        data.setup("fit")
        (microbatch,) = next(iter(data.train_dataloader())).microbatches
        learnt.append(tokenizer.decode(microbatch.labels[microbatch.response_mask], skip_special_tokens=True))
    pairs = [json.loads(line) for line in code.splitlines()]
    assert learnt == [pairs[0]["output"], "It is 5.", pairs[2]["output"]]


def test_the_reward_of_the_readme_tells_right_from_wrong():
    names: dict = {}
    exec(OWN_FILES["rewards.py"], names)
    reward = names["right_and_short"]
    assert reward(" 2 + 3 = 5 </think> <answer> 5 </answer>", "5") == dict.fromkeys(REWARDS, 1.0)
    assert reward(" 2 + 3 = 6 </think> <answer> 6 </answer>", "5")["reward"] == 0.0
    assert reward("well " * 20 + " <answer> 5 </answer>", "5")["reward"] == 0.0


@pytest.mark.slow
def test_the_quickstart_learns(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sft"])
    torch.set_num_threads(2)
    cli = run_command(
        ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.enable_progress_bar", "false"]
    )
    assert cli.trainer.callback_metrics["val/answer_reward"] >= 0.95
