"""The rooms of the package: imports point down, and importing does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_sft"
FLOORS = (
    {"messages", "time_limit", "page", "answers", "model_card"},
    {"tokenization", "tiles", "attention", "losses", "rewards", "sharding", "outcome", "signals", "records"}
    | {"sampling", "lora"},
    {"checkpoint_files", "head", "chat", "batching", "metrics", "gsm8k", "pretrained", "predictions", "preview"}
    | {"run_length", "trainer_checks"},
    {"log_probs", "rows", "step_loader", "export"},
    {"generation", "dataset", "mixture", "memory", "export_command"},
    {"stream"},
    {"datamodule", "module"},
    {"callbacks"},
    {"trial", "estimate"},
    {"learning_rates", "batch_sizes"},
    {"trainer", "demo"},
    {"cli"},
)
BELOW = {room: set().union(*FLOORS[:floor]) for floor, rooms in enumerate(FLOORS) for room in rooms}
BELOW["losses"] = BELOW["tiles"] = BELOW["attention"] = set()


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_sft":
            parts = node.module.split(".")
            yield from parts[1:2] or [alias.name for alias in node.names]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    own = {room} if (PACKAGE / room).is_dir() else set()
    assert set(imported_rooms(path)) <= BELOW[room] | own


def test_every_module_has_a_floor():
    rooms = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms - {"__init__", "__main__"} == set(BELOW)


def test_importing_starts_no_device_and_no_verifier():
    code = (
        "import sys, torch, lightning_sft\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'math_verify' not in sys.modules\n"
        "assert set(lightning_sft.__all__) <= set(dir(lightning_sft))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_strings_and_tensors_need_no_lightning():
    """The lowest floors are usable where only torch and transformers are."""
    for room in FLOORS[0] | FLOORS[1]:
        names = {
            (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not any(name.split(".")[0] in ("lightning", "torchmetrics", "datasets") for name in names)
