"""Every notebook runs from its first cell to its last, in an empty folder, with parameters for a run of seconds."""

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html import unescape
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from lightning_sft import Sampling, SFTModule, log_generations
from lightning_sft.demo import word_problems, word_tokenizer

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
PARAMETERS = {"quickstart": {"max_steps": 24, "validate_every": 12, "num_rows": 200, "num_prompts": 6}}


@dataclass
class Run:
    """An executed notebook and the folder that it ran in."""

    notebook: nbformat.NotebookNode
    folder: Path

    def html(self, cell_id: str) -> str:
        """What a cell shows."""
        (cell,) = [cell for cell in self.notebook.cells if cell.id == cell_id]
        return "".join(output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {}))

    @property
    def logs(self) -> Path:
        return self.folder / "runs" / "notebook" / "version_0"


def read_notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, int]) -> None:
    """Replace the cell tagged `parameters`."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE)
    assert names == list(values), f"The notebook's parameters are {names}, those of the test {list(values)}."
    cell.source = "\n".join(f"{name} = {value}" for name, value in values.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Executes a notebook when first asked for it."""

    @cache
    def execute(name: str) -> Run:
        notebook, folder, home = read_notebook(name), tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("home")
        set_parameters(notebook, PARAMETERS[name])
        # Without folders to search, "python3" is this interpreter, whatever kernels are installed on the machine.
        kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        environment = os.environ | {
            "HF_HOME": str(home),
            "IPYTHONDIR": str(home),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "OMP_NUM_THREADS": "1",
        }
        client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(folder)}})
        client.execute(env=environment, cleanup_kc=True)
        return Run(notebook, folder)

    return execute


def tokens(html: str) -> list[tuple[str, str]]:
    """Kind and text of each coloured token."""
    return [(kind, unescape(text)) for kind, text in re.findall(r'<span class="(\w+)"[^>]*>(.*?)</span>', html)]


def text(html: str, kind: str) -> str:
    return "".join(text for other, text in tokens(html) if other == kind)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stored_notebook_has_no_outputs(name: str) -> None:
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]
    assert cells
    assert [cell.id for cell in cells if cell.outputs or cell.execution_count is not None] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end_and_leaves_only_its_run(name: str, run: Callable[[str], Run]) -> None:
    executed = run(name)
    cells = [cell for cell in executed.notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [path.name for path in executed.folder.iterdir()] == ["runs"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_no_warning(name: str, run: Callable[[str], Run]) -> None:
    pytest.importorskip("ipywidgets", reason="without ipywidgets, tqdm and rich warn that they show no progress bar")
    shown = [output for cell in run(name).notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in shown if output.get("name") == "stderr" or "Warning" in str(output)] == []


def test_green_tokens_are_the_response_and_its_eos_and_no_others(run: Callable[[str], Run]) -> None:
    problems = word_problems(PARAMETERS["quickstart"]["num_rows"])
    outputs = dict(zip(problems["prompt"], problems["output"], strict=True))
    rows = re.findall(r"<p>(.*?)</p>", run("quickstart").html("rows"))
    assert len(rows) == 3
    for row in rows:
        prompt = "User:" + text(row, "prompt")  # the first token is no label
        assert text(row, "response") == outputs[prompt] + "<eos>"
        kinds = [kind for kind, _ in tokens(row)]
        assert kinds == sorted(kinds, key=["prompt", "response", "padding"].index)
        assert {token for kind, token in tokens(row) if kind == "padding"} <= {"<pad>"}
        assert len(kinds) == len(tokens(rows[0]))
    assert text(rows[0], "padding") == ""
    assert text(rows[2], "padding") != ""


def test_labels_are_the_inputs_shifted_by_one_and_the_mask_begins_after_think(run: Callable[[str], Run]) -> None:
    html = run("quickstart").html("boundary")
    table = {
        name: [unescape(cell).strip() for cell in re.findall(r"<td>(.*?)</td>", cells)]
        for name, cells in re.findall(r"<th>(\w+)</th>\s*((?:<td>.*?</td>\s*)+)", html)
    }
    assert list(table) == ["input_ids", "labels", "response_mask"]
    assert table["input_ids"][1:] == table["labels"][:-1]
    assert table["input_ids"][:3] == ["?", "Assistant:", "<think>"]
    assert table["response_mask"] == ["False"] * 2 + ["True"] * 5


def test_the_model_is_that_of_the_quickstart_config(run: Callable[[str], Run]) -> None:
    config = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())["model"]
    checkpoint = torch.load(run("quickstart").logs / "checkpoints" / "last.ckpt", weights_only=True)
    hyper_parameters, (optimizer,) = checkpoint["hyper_parameters"], checkpoint["optimizer_states"]
    assert {name: hyper_parameters["model"][name] for name in config["model"]} == config["model"]
    assert hyper_parameters["warmup_steps"] == config["warmup_steps"]
    arguments = config["optimizer"]["init_args"]
    (group,) = optimizer["param_groups"]
    assert group["initial_lr"] == float(arguments["lr"])
    assert list(group["betas"]) == arguments["betas"]
    assert group["weight_decay"] == arguments["weight_decay"]


def test_the_loss_falls_and_both_curves_are_drawn(run: Callable[[str], Run]) -> None:
    executed = run("quickstart")
    with open(executed.logs / "metrics.csv") as file:
        lines = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss"):
        curve = [float(line[name]) for line in lines if line[name]]
        assert len(curve) >= 2
        assert curve[-1] < curve[0] - 0.5
    (plot,) = [cell for cell in executed.notebook.cells if cell.id == "plot"]
    (figure,) = plot.outputs
    assert re.search(r"with 2 Axes", figure.data["text/plain"])
    assert figure.data["image/png"]


def test_answers_before_and_after_are_those_of_the_json_lines(run: Callable[[str], Run]) -> None:
    executed = run("quickstart")
    _, *rows = re.findall(r"<tr>(.*?)</tr>", executed.html("generations"))
    shown = [tuple(unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)) for row in rows]
    before, after = (
        [json.loads(line) for line in (executed.logs / "generations" / f"step_{step}.jsonl").read_text().splitlines()]
        for step in (0, PARAMETERS["quickstart"]["max_steps"])
    )
    marks = {0.0: "✗", 1.0: "✓"}
    assert shown == [
        (first["prompt"], *(f"{marks[record['answer_reward']]}{record['response']}" for record in (first, last)))
        for first, last in zip(before[:4], after[:4], strict=True)
    ]
    assert before[0]["response"] != after[0]["response"]


def test_the_last_problem_is_new_and_answered_by_the_checkpoint(run: Callable[[str], Run]) -> None:
    executed = run("quickstart")
    prompt, response = (text(executed.html("answer"), kind) for kind in ("prompt", "response"))
    assert " has 17 pens, finds 10 more, then gives 5 to " in prompt
    solution = " 17 + 10 = 27 ; 27 - 5 = 22 </think> <answer> 22 </answer>"
    assert solution not in set(word_problems(30_000)["output"])
    assert solution in set(word_problems(10_000, split="validation")["output"])

    module = SFTModule.load_from_checkpoint(executed.logs / "checkpoints" / "last.ckpt")
    sampling = Sampling(max_new_tokens=20)
    (record,), _ = log_generations(module.model, word_tokenizer(), [prompt], ["22"], sampling=sampling)
    assert record.response == response
    assert f"answer_reward {record.answer_reward:g}" in executed.html("answer")
