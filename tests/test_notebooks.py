"""Every notebook runs from its first cell to its last, in an empty folder, with parameters for a run of seconds.

Each is executed by one test alone, so that two workers of pytest-xdist never execute it twice.
"""

import csv
import json
import math
import re
import sys
from base64 import b64decode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from html import unescape
from io import BytesIO
from itertools import combinations
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from PIL import Image
from support.paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft import Sampling, SFTModule, log_generations
from lightning_sft.examples import word_problems, word_tokenizer

sys.path.insert(0, str(ROOT / "notebooks"))

from execute import execute

PARAMETERS = {
    "expert_iteration": {
        "num_labelled": 300,
        "start_steps": 150,
        "num_rounds": 2,
        "num_problems": 60,
        "num_samples": 8,
        "round_steps": 4,
    },
    "quickstart": {"max_steps": 24, "validate_every": 12, "num_rows": 200, "num_prompts": 6},
    "reading_a_run": {"max_steps": 30, "validate_every": 15, "num_prompts": 24, "num_samples": 4},
    "text_to_gradient": {"num_steps": 20, "batch_size": 16},
}
WITHOUT_FILES = ("expert_iteration", "text_to_gradient")


@dataclass
class Run:
    """An executed notebook and the folder that it ran in."""

    name: str
    notebook: nbformat.NotebookNode
    folder: Path

    def outputs(self, cell_id: str) -> list[nbformat.NotebookNode]:
        (cell,) = [cell for cell in self.notebook.cells if cell.id == cell_id]
        return cell.outputs

    def html(self, cell_id: str) -> str:
        """What a cell shows."""
        return "".join(output.get("data", {}).get("text/html", "") for output in self.outputs(cell_id))

    def text(self, cell_id: str) -> str:
        """What a cell prints, and its value as text."""
        outputs = self.outputs(cell_id)
        return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)

    @property
    def logs(self) -> Path:
        (folder,) = (self.folder / "runs").glob("*/version_0")
        return folder

    def generations(self, step: int) -> list[dict]:
        return json_lines(self.logs / "generations" / f"step_{step}.jsonl")


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def set_parameters(notebook: nbformat.NotebookNode, values: dict[str, int]) -> None:
    """Replace the cell tagged `parameters`."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE)
    assert names == list(values), f"The notebook's parameters are {names}, those of the test {list(values)}."
    cell.source = "\n".join(f"{name} = {value}" for name, value in values.items())


def run_quickly(name: str, folder: Path, home: Path) -> Run:
    notebook = read_notebook(name)
    set_parameters(notebook, PARAMETERS[name])
    execute(notebook, folder, seconds=300, HF_HOME=str(home), IPYTHONDIR=str(home), OMP_NUM_THREADS="1")
    return Run(name, notebook, folder)


def marked_rows(html: str) -> list[list[tuple[str, str]]]:
    """For each row of a batch that is shown: whether a token is coloured as prompt or response, and its text."""
    kinds = {"808080": "prompt", "2ea043": "response"}
    return [
        [(kinds[colour], unescape(text)) for colour, text in re.findall(r"background:#(\w{6})\w\w>(.*?)</span>", row)]
        for row in re.findall(r"<div style='font-family:monospace.*?>(.*?)</div>", html)
    ]


def text(tokens: list[tuple[str, str]], kind: str) -> str:
    return "".join(text for other, text in tokens if other == kind)


def cells(html: str) -> list[list[str]]:
    """The texts of a table's rows, but for its head."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL)]
    return [[unescape(re.sub(r"<[^>]*>", "", cell.replace("<br>", "\n"))) for cell in row] for row in rows if row]


def numbers(text: str) -> list[float]:
    """Of each line the last number."""
    return [float(re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", line)[-1]) for line in text.splitlines()]


def shown(record: dict) -> list[str]:
    """A record's row in a table, but for what is rounded."""
    texts = [record[name].strip() for name in ("prompt", "response", "ground_truth")]
    return [*texts, f"{record['reward']:.1f}", str(record["response_length"])]


def shown_rows(html: str) -> list[list[str]]:
    return [row[:5] for row in cells(html)]


# -- all notebooks -----------------------------------------------------------------------------------------------------


def every_cell_ran_in_order_and_only_the_run_is_left(run: Run) -> None:
    counts = [cell.execution_count for cell in run.notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert [path.name for path in run.folder.iterdir()] == ([] if run.name in WITHOUT_FILES else ["runs"])


def no_warning_is_shown(run: Run) -> None:
    outputs = [output for cell in run.notebook.cells for output in cell.get("outputs", [])]
    # On processors with bfloat16 arithmetic bitsandbytes says, when it is imported, that it has no kernel for them.
    outputs = [output for output in outputs if "kernels-community" not in output.get("text", "")]
    assert [output for output in outputs if output.get("name") == "stderr" or "Warning" in str(output)] == []


def figures_are_transparent_and_suit_light_and_dark(run: Run) -> None:
    outputs = [output for cell in run.notebook.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) >= 1
    for figure in figures:
        with Image.open(BytesIO(b64decode(figure.data["image/png"]))) as image:
            assert image.getpixel((0, 0))[3] == 0
        assert "needs_background" not in figure.metadata  # Jupyter would put a white or black sheet behind it


def the_page_is_linked_and_shown(run: Run) -> None:
    html = run.html("page")
    path = f"runs/{run.logs.parent.name}/version_0/generations/index.html"
    assert re.search(rf"<a href='{path}'", html)
    assert re.search(rf'<iframe[^>]* src="{path}"', html.replace("\n", " "))
    assert (run.folder / path).is_file()


# -- quickstart --------------------------------------------------------------------------------------------------------


def green_tokens_are_the_response_and_its_eos_and_no_others(run: Run) -> None:
    problems = word_problems(PARAMETERS["quickstart"]["num_rows"])
    outputs = dict(zip(problems["prompt"], problems["output"], strict=True))
    html = run.html("datamodule")
    assert "64 sequences" in html
    rows = marked_rows(html)
    assert len(rows) == 8
    for row in rows:
        assert text(row, "response") == outputs[text(row, "prompt")] + "<eos>"
        kinds = [kind for kind, _ in row]
        assert kinds == sorted(kinds)  # all of the prompt, then all of the response


def labels_are_the_inputs_shifted_by_one_and_the_mask_begins_after_think(run: Run) -> None:
    table = {
        name: [unescape(cell).strip() for cell in re.findall(r"<td>(.*?)</td>", cells)]
        for name, cells in re.findall(r"<th>(\w+)</th>\s*((?:<td>.*?</td>\s*)+)", run.html("boundary"))
    }
    assert list(table) == ["input_ids", "labels", "response_mask"]
    assert table["input_ids"][1:] == table["labels"][:-1]
    assert table["input_ids"][:3] == ["?", "Assistant:", "<think>"]
    assert table["response_mask"] == ["False"] * 2 + ["True"] * 5


def the_model_is_that_of_the_quickstart_config(run: Run) -> None:
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["model"]
    checkpoint = torch.load(run.logs / "checkpoints" / "last.ckpt", weights_only=True)
    hyper_parameters, (optimizer,) = checkpoint["module_hyper_parameters"], checkpoint["optimizer_states"]
    assert {name: hyper_parameters["model"][name] for name in config["model"]} == config["model"]
    assert hyper_parameters["warmup_steps"] == config["warmup_steps"]
    arguments = config["optimizer"]["init_args"]
    (group,) = optimizer["param_groups"]
    assert group["initial_lr"] == float(arguments["lr"])
    assert list(group["betas"]) == arguments["betas"]
    assert group["weight_decay"] == arguments["weight_decay"]


def the_loss_falls_and_both_curves_are_drawn(run: Run) -> None:
    with open(run.logs / "metrics.csv") as file:
        lines = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss"):
        curve = [float(line[name]) for line in lines if line[name]]
        assert len(curve) >= 2
        assert curve[-1] < curve[0] - 0.5
    (figure,) = run.outputs("plot")
    assert "with 2 Axes" in figure.data["text/plain"]


def responses_before_and_after_are_those_of_the_json_lines(run: Run) -> None:
    before, after = (run.generations(step)[:3] for step in (0, PARAMETERS["quickstart"]["max_steps"]))
    assert shown_rows(run.html("generations")) == [shown(record) for record in [*before, *after]]
    assert before[0]["response"] != after[0]["response"]


def the_last_problem_is_new_and_answered_by_the_checkpoint(run: Run) -> None:
    ((prompt, _, ground_truth, *_),) = cells(run.html("answer"))
    assert " has 17 pens, finds 10 more, then gives 5 to " in prompt
    assert ground_truth == "22"
    solution = " 17 + 10 = 27 ; 27 - 5 = 22 </think> <answer> 22 </answer>"
    assert solution not in set(word_problems(30_000)["output"])
    assert solution in set(word_problems(10_000, split="validation")["output"])

    module = SFTModule.load_from_checkpoint(run.logs / "checkpoints" / "last.ckpt")
    sampling = Sampling(max_new_tokens=20)
    (record,), _ = log_generations(module.model, word_tokenizer(), [prompt], ["22"], sampling=sampling)
    assert shown_rows(run.html("answer")) == [shown(vars(record))]


# -- text_to_gradient --------------------------------------------------------------------------------------------------


def four_problems() -> tuple[list[str], list[str]]:
    problems = word_problems(4, seed=3)
    short = [f" </think> <answer> {answer} </answer>" for answer in problems["ground_truth"]]
    return list(problems["prompt"]), [*problems["output"][:2], *short[2:]]


def the_mask_is_green_on_the_outputs_and_the_shapes_are_of_the_longest_row(run: Run) -> None:
    prompts, outputs = four_problems()
    rows = marked_rows(run.html("mask"))
    assert [text(row, "prompt") for row in rows] == prompts
    assert [text(row, "response") for row in rows] == outputs
    tokenizer = word_tokenizer()
    longest = max(len(tokenizer.encode(a + b)) for a, b in zip(prompts, outputs, strict=True))
    for cell_id, names in (("tokenize", "input_ids labels response_mask"), ("model", "log_probs token_entropy")):
        assert run.text(cell_id) == str(dict.fromkeys(names.split(), (4, longest - 1)))


def what_is_computed_twice_differs_by_rounding_alone(run: Run) -> None:
    for cell_id, num_lines in (("formulas", 3), ("microbatch", 2), ("accumulate", 1), ("averages", 2)):
        lines = numbers(run.text(cell_id))
        assert len(lines) == num_lines
        if cell_id == "microbatch":
            (loss, by_hand), lines = re.findall(r"\d+\.\d{6}", run.text(cell_id)), lines[1:]
            assert loss == by_hand
        if cell_id == "averages":
            lines = lines[1:]
        assert all(0 <= difference < 1e-13 for difference in lines)


def averaging_per_microbatch_is_as_wrong_as_is_printed(run: Run) -> None:
    tokenizer, (prompts, outputs) = word_tokenizer(), four_problems()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64, "vocab_size": len(tokenizer)}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **heads)).double()
    sums, counts = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        start, ids = len(tokenizer.encode(prompt)), torch.tensor(tokenizer.encode(prompt + output))
        log_p = model(ids[None]).logits[0].log_softmax(-1)
        sums.append(-sum(log_p[i - 1, ids[i]] for i in range(start, len(ids))))
        counts.append(len(ids) - start)
    exact, averaged = (
        torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
        for loss in (
            sum(sums) / sum(counts),
            (sum(sums[:2]) / sum(counts[:2]) + sum(sums[2:]) / sum(counts[2:])) / 2,
        )
    )
    printed = numbers(run.text("averages"))[0]
    assert printed == pytest.approx(float((averaged - exact).norm() / exact.norm()), abs=0.006)
    assert printed > 0.3
    loss, logarithm = map(float, re.findall(r"\d\.\d{3}", run.text("normalize")))
    assert loss == pytest.approx((sum(sums) / sum(counts)).item(), abs=6e-4)
    assert logarithm == pytest.approx(math.log(83), abs=6e-4)


def training_makes_the_response_likely_and_its_entropy_small(run: Run) -> None:
    (likely_before, likely_after), (entropy_before, entropy_after) = (
        map(float, row) for row in cells(run.html("numbers"))
    )
    assert likely_before == pytest.approx(-math.log(83), abs=0.2)
    assert entropy_before == pytest.approx(math.log(83), abs=0.1)
    assert likely_after > likely_before + 1
    assert entropy_after < entropy_before - 1
    (figure,) = run.outputs("plot")
    assert "with 2 Axes" in figure.data["text/plain"]


# -- reading_a_run -----------------------------------------------------------------------------------------------------


def one_prompt_is_followed_through_the_steps(run: Run) -> None:
    steps = (0, 15, 30)
    assert shown_rows(run.html("follow")) == [shown(run.generations(step)[0]) for step in steps]
    assert re.findall(r"<th>(\d+)</th>", run.html("follow")) == [str(step) for step in steps]


def entropies_before_and_after_are_those_of_the_json_lines(run: Run) -> None:
    expected = []
    for name in ("token_entropies", "token_log_probs"):
        for step in (0, 30):
            values = [value for record in run.generations(step) for value in record[name]]
            expected.append(sum(values) / len(values))
    printed = run.text("histograms").splitlines()[:4]
    assert numbers("\n".join(printed)) == pytest.approx(expected, abs=6e-4)
    assert expected[1] < expected[0] - 1
    assert expected[3] > expected[2] + 1


def pass_at_k_is_the_share_of_draws_with_a_right_one(run: Run) -> None:
    table = cells(run.html("pass_at"))
    for column, temperature in enumerate((0.3, 1.0)):
        right: dict[int, list[bool]] = {}
        for record in json_lines(run.logs / f"samples_{temperature}.jsonl"):
            right.setdefault(record["index"], []).append(record["answer_reward"] == 1)
        assert {len(samples) for samples in right.values()} == {4}
        assert any(map(any, right.values()))
        for row, k in enumerate((1, 2, 4)):
            draws = [any(draw) for samples in right.values() for draw in combinations(samples, k)]
            assert float(table[row][column]) == pytest.approx(sum(draws) / len(draws), abs=6e-4)
    assert len(table) == 3


def lengths_are_counted_apart_for_right_responses(run: Run) -> None:
    records = json_lines(run.logs / "samples_1.0.jsonl")
    lengths = Counter(record["response_length"] for record in records)
    lines = re.findall(r"(\d+) tokens: (\d+) responses, (\d+)% correct", run.text("lengths"))
    assert len(lines) == 2
    for length, count, share in (map(int, line) for line in lines):
        right = sum(record["answer_reward"] for record in records if record["response_length"] == length)
        assert count == lengths[length]
        assert share == pytest.approx(100 * right / count, abs=0.51)
    assert [int(count) for _, count, _ in lines] == [count for _, count in lengths.most_common(2)]


def samples_of_one_problem_are_shown(run: Run) -> None:
    rows, records = shown_rows(run.html("samples_of_one")), json_lines(run.logs / "samples_1.0.jsonl")
    chosen = next(record["index"] for record in records if shown(record) == rows[0])
    assert rows == [shown(record) for record in records if record["index"] == chosen]


def each_round_adds_rows_and_is_drawn_beside_a_model_that_learns_nothing_new(run: Run) -> None:
    html = run.html("iterate")
    for name in ("own right answers", "nothing new", "rows", "right among its samples"):
        assert f"<th>{name}</th>" in html
    rounds = cells(html)
    assert len(rounds) == 3
    assert rounds[0][0] == rounds[0][1] == re.findall(r"^(\S+) of the held-out", run.text("base"))[0]
    counts = [int(row[2]) for row in rounds]
    assert counts[0] == 0
    assert 0 < counts[1] <= counts[2] <= 2 * 2 * 60


def the_rows_that_are_shown_are_right_answers(run: Run) -> None:
    for _, output in cells(run.html("rows")):
        numbers_in_it = re.findall(r"\d+", output)
        assert output.endswith(f"<answer> {numbers_in_it[-1]} </answer><eos>")


CHECKS: dict[str, list[Callable[[Run], None]]] = {
    "expert_iteration": [
        each_round_adds_rows_and_is_drawn_beside_a_model_that_learns_nothing_new,
        the_rows_that_are_shown_are_right_answers,
    ],
    "quickstart": [
        green_tokens_are_the_response_and_its_eos_and_no_others,
        labels_are_the_inputs_shifted_by_one_and_the_mask_begins_after_think,
        the_model_is_that_of_the_quickstart_config,
        the_loss_falls_and_both_curves_are_drawn,
        responses_before_and_after_are_those_of_the_json_lines,
        the_last_problem_is_new_and_answered_by_the_checkpoint,
        the_page_is_linked_and_shown,
    ],
    "reading_a_run": [
        one_prompt_is_followed_through_the_steps,
        entropies_before_and_after_are_those_of_the_json_lines,
        pass_at_k_is_the_share_of_draws_with_a_right_one,
        lengths_are_counted_apart_for_right_responses,
        samples_of_one_problem_are_shown,
        the_page_is_linked_and_shown,
    ],
    "text_to_gradient": [
        the_mask_is_green_on_the_outputs_and_the_shapes_are_of_the_longest_row,
        what_is_computed_twice_differs_by_rounding_alone,
        averaging_per_microbatch_is_as_wrong_as_is_printed,
        training_makes_the_response_likely_and_its_entropy_small,
    ],
}


def test_every_notebook_has_checks() -> None:
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == list(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_is_stored_with_what_it_shows_small_and_without_paths_of_a_machine(name: str) -> None:
    """Stored by `python notebooks/execute.py`."""
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(json.dumps(outputs)) < 400_000
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    texts = json.dumps(outputs)
    assert not re.findall(r"/(?:home|root|tmp|usr|work|Users)/|Traceback|Warning", texts)
    assert str(ROOT) not in texts


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs_and_what_it_shows_is_right(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = run_quickly(name, tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("home"))
    every_cell_ran_in_order_and_only_the_run_is_left(run)
    no_warning_is_shown(run)
    figures_are_transparent_and_suit_light_and_dark(run)
    for check in CHECKS[name]:
        check(run)
