"""Runs beside one another: which responses are matched, what their rewards differ by, and what is refused."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.refusals import Refusal, each, write

from lightning_sft import GenerationRecord, compare_runs
from lightning_sft.errors import MissingFileError, SettingsTypeError
from lightning_sft.generation.records import write_records
from lightning_sft.results import compared_run
from lightning_sft.results.compared_prompts import match_prompts


def record(prompt, reward, index=0, sample=0, response="r", ground_truth="g"):
    tokens = [response, "<eos>"]
    return GenerationRecord(
        prompt, response, ground_truth, reward, reward, reward, 0.5, 2, "eos", None, index, sample,
        [1, 2], tokens, [-0.5, -1.5], [0.1, 0.9],
    )  # fmt: skip


def run_folder(path, metrics="step,val/loss\n5,1.5\n10,1.25\n", **steps):
    """A run with a file of metrics and the records of steps."""
    if metrics is not None:
        write(path / "metrics.csv", metrics)
    for step, records in steps.items():
        write_records(path / "generations" / f"{step}.jsonl", records, step=int(step.removeprefix("step_")))
    return path


def page_data(path, block="data"):
    text = path.read_text(encoding="utf-8").partition(f'id="{block}">')[2].partition("</script>")[0]
    return json.loads(text) if block != "tokens" else [json.loads(line) for line in text.splitlines()]


def test_prompts_are_matched_by_their_text_with_all_of_their_samples():
    first = [record("b", 1.0, 1), record("a", 0.0, 0, 1), record("a", 1.0, 0, 0), record("a", 0.5, 7)]
    other = [record("c", 1.0, 0, ground_truth=None), record("a", None, 3, ground_truth="h")]
    found = match_prompts([first, other])
    assert [prompt.prompt for prompt in found] == ["a", "b", "c"]
    assert found[0].responses == [[first[2], first[1], first[3]], [other[1]]]
    assert [prompt.ground_truths for prompt in found] == [["g", "h"], ["g"], []]
    assert [[prompt.reward(run) for run in (0, 1)] for prompt in found] == [[0.5, None], [1.0, None], [None, 1.0]]


def test_the_difference_is_a_mean_over_prompts_that_both_have_rewards_for(tmp_path):
    rewards = {"a": ([1.0, 0.0], [1.0]), "b": ([0.0], [1.0, 1.0, 0.0, 0.0]), "c": ([1.0], [0.0]), "d": ([1.0], [1.0])}
    runs = [
        [record(prompt, reward, 0, i) for prompt, both in rewards.items() for i, reward in enumerate(both[run])]
        for run in (0, 1)
    ]
    files = [tmp_path / f"{run}.jsonl" for run in (0, 1)]
    write_records(files[0], [*runs[0], record("only first", 1.0), record("unscored", None)])
    write_records(files[1], [*runs[1], record("only second", 0.0), record("unscored", 1.0)])
    found = compare_runs(files, tmp_path / "page.html")
    (difference,) = found.differences
    differences = np.array([0.5, 0.5, -1.0, 0.0])
    assert difference.mean == differences.mean() == 0.0
    assert (difference.num_pairs, difference.num_better, difference.num_worse) == (4, 2, 1)
    naive = np.random.default_rng(9).choice(differences, (20_000, 4)).mean(axis=1)
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])), abs=0.13)
    assert (found.num_prompts, found.num_common) == (7, 5)
    assert "Reward of 1 above 0: +0.000 (95%: " in str(found)
    assert str(found).endswith("4 pairs, 2 better, 1 worse\nPage: " + str(tmp_path / "page.html"))


def test_runs_that_are_the_same_differ_by_exactly_nothing(tmp_path):
    records = [record(f"p{i}", i / 7, i, sample) for i in range(7) for sample in range(3)]
    for name in "ab":
        write_records(tmp_path / f"{name}.jsonl", records)
    (difference,) = compare_runs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "page.html").differences
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert (difference.num_pairs, difference.num_better, difference.num_worse) == (7, 0, 0)


def test_of_a_folder_the_last_step_is_compared_or_the_one_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = run_folder(tmp_path / "x" / "version_0", step_5=[record("a", 0.0)], step_20=[record("a", 1.0)])
    other = run_folder(tmp_path / "y" / "version_0", step_5=[record("a", 0.25)])
    base = one / "generations" / "step_5.jsonl"
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(base.read_bytes().rstrip(b"\n")))  # its last line has no end
    found = compare_runs(["x/version_0", "y/version_0", base, packed])
    assert found.names == ["x/version_0", "y/version_0", "generations/step_5", f"{tmp_path.name}/packed.jsonl.gz"]
    assert [summary["reward"] for summary in found.summaries] == [1.0, 0.25, 0.0, 0.0]
    data = page_data(tmp_path / "comparison.html")
    assert [run["step"] for run in data["runs"]] == [20, 5, 5, None]
    found = compare_runs([one, other, base], step=5, names=["p", "q", "r"])
    assert [summary["reward"] for summary in found.summaries] == [0.0, 0.25, 0.0]
    assert [run["name"] for run in page_data(found.page)["runs"]] == found.names == ["p", "q", "r"]


def test_a_page_has_the_curves_of_runs_with_different_metrics_and_the_settings_in_which_they_differ(tmp_path):
    one = run_folder(tmp_path / "one", "step,epoch,lr,loss\n1,0.1,0.00001,2.0\n2,0.2,,1.0\n", step_1=[record("a", 0.0)])
    losses = [abs(i - 1234) / 1e4 for i in range(5000)]
    other = run_folder(tmp_path / "other", "step,loss,new\n" + "".join(f"{i},{x},\n" for i, x in enumerate(losses)))
    write(one / "config.yaml", "a: 1\nb: {c: [2], d: same}\n")
    write(other / "hparams.yaml", "b.c: [3]\nb.d: same\n")
    found = compare_runs([one, other], tmp_path / "page.html")
    curves = page_data(found.page, "curves")
    assert curves.keys() == {"lr", "loss"}
    assert curves["lr"] == [[[1, 0.00001]], []]
    assert curves["loss"][0] == [[1, 2.0], [2, 1.0]]
    steps, values = zip(*curves["loss"][1], strict=True)
    assert (steps[0], steps[-1], 1234 in steps) == (0, 4999, True)
    assert list(values) == [losses[step] for step in steps]
    assert len(steps) <= 802
    settings = {each["name"]: each["values"] for each in page_data(found.page)["settings"]}
    assert settings == {"a": ["1", None], "b.c": ["[2]", "[3]"]}
    assert found.notes == []
    assert "other: no responses\n" in str(found)
    assert "above one" not in str(found)


def test_runs_without_responses_are_a_table_of_their_losses_and_of_the_settings_in_which_they_differ(
    tmp_path, monkeypatch
):
    curves = {"a": "2,1.5\n4,1.25\n6,1.75", "b": "2,2.0\n4,\n6,0.5", "c": "2,", "d": "2,nan\n4,3.0"}
    for (name, curve), lr in zip(curves.items(), (0.1, 0.01, None, 0.1), strict=True):
        run_folder(
            tmp_path / name, f"step,val/loss,train/loss\n{curve}\n".replace("\n", ",1.0\n").replace("loss,1.0", "loss")
        )
        write(tmp_path / name / "config.yaml", json.dumps({"model": {"lr": lr, "seed": 0}}))
    found = compare_runs([tmp_path / name for name in curves], tmp_path / "page.html")
    assert list(found.table.index) == found.names == list("abcd")
    expected = {
        "val/loss": [1.75, 0.5, None, 3.0],
        "lowest val/loss": [1.25, 0.5, None, 3.0],
        "at step": [4, 6, None, 4],
    }
    expected["model.lr"] = [0.1, 0.01, None, 0.1]
    assert {name: [None if pd.isna(x) else x for x in values] for name, values in found.table.items()} == expected
    assert [line.split() for line in str(found).splitlines()] == [
        ["val/loss", "lowest", "val/loss", "at", "step", "model.lr"],
        ["a", "1.75", "1.25", "4", "0.1"],
        ["b", "0.5", "0.5", "6", "0.01"],
        ["c", "-", "-", "-", "-"],
        ["d", "3", "3", "4", "0.1"],
        ["Page:", str(tmp_path / "page.html")],
    ]
    monkeypatch.setattr("lightning_sft.results.comparison._MOST_COLUMNS", 3)
    assert "model.lr" not in str(found)
    assert str(found).splitlines()[-2] == "1 further difference on the page."


def test_a_page_that_cannot_hold_all_tokens_has_those_of_prompts_where_the_runs_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_sft.results.comparison_page._MOST_TOKENS", 8)
    same, text, reward = "same", "other text", "other reward"
    for name in "ab":
        is_b = float(name == "b")
        records = [record(same, 1.0), record(text, 1.0, 1, response=name), record(reward, is_b, 2, response=name)]
        write_records(tmp_path / f"{name}.jsonl", records)
    found = compare_runs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "page.html")
    shown = {
        prompt["prompt"]: [one["line"] for (one,) in prompt["responses"]] for prompt in page_data(found.page)["prompts"]
    }
    assert shown == {same: [None, None], text: [0, 1], reward: [2, 3]}
    assert page_data(found.page, "tokens")[3] == [["b", "<eos>"], [1, 2], [-0.5, -1.5], [0.1, 0.9]]


def test_a_path_that_ends_as_another_one_is_named_as_a_whole():
    assert compared_run._names_of([Path("/a/b.jsonl"), Path("/x/a/b.jsonl")]) == ["/a/b", "x/a/b"]


def two(folder, second, **options):
    """A good file beside something else."""
    write_records(folder / "a.jsonl", [record("a", 1.0)])
    return compare_runs([folder / "a.jsonl", second], folder / "page.html", **options)


def line(**changes):
    return json.dumps(record("a", 1.0).to_json() | changes) + "\n"


REFUSED = {
    "one run only": Refusal(
        lambda folder: compare_runs(["x"]),
        "`runs` is only 'x', expected the folders of at least two runs, or files of records. A step of a run is a "
        "file, such as runs/quickstart/version_0/generations/step_0.jsonl.",
    ),
    "one text": Refusal(
        lambda folder: compare_runs("x"),
        "`runs` is 'x' of type str, expected the folders of at least two runs, or files of records.",
        SettingsTypeError,
    ),
    "the same twice": Refusal(
        lambda folder: two(folder, folder / "b" / ".." / "a.jsonl"),
        "`runs` has '{tmp}/a.jsonl' twice. Give each run once.",
    ),
    "missing": Refusal(
        lambda folder: two(folder, folder / "b"),
        "`runs` has '{tmp}/b', but there is no such folder or file.",
        MissingFileError,
    ),
    "no run": Refusal(
        lambda folder: two(folder, write(folder / "b/x", "").parent),
        "`runs`: `folder` is '{tmp}/b', which has no settings, metrics or generations.",
    ),
    "neither generations nor metrics": Refusal(
        lambda folder: two(folder, write(folder / "b/config.yaml", "a: 1").parent),
        "`runs`: '{tmp}/b' has neither generations nor metrics. {tmp}/b has no metrics that "
        "can be read. It had no logger, or one that keeps them elsewhere. Give the run a `CSVLogger` or a "
        "`TensorBoardLogger`, in addition to others if needed.",
    ),
    "step that a folder lacks": Refusal(
        lambda folder: two(folder, run_folder(folder / "b", step_5=[record("a", 1.0)]), step=4),
        "`runs`: {tmp}/b has no generations of step 4; the steps that have some: 5.",
    ),
    "step of files": Refusal(
        lambda folder: two(folder, write(folder / "b.jsonl", line()), step=4),
        "`step` is 4, but `runs` are files, each of one step. Leave it out, or give folders.",
    ),
    "names": Refusal(
        lambda folder: two(folder, write(folder / "b.jsonl", line()), names=["x", "x"]),
        "`names` is ['x', 'x'], expected 2 different names, one for each run.",
    ),
    "empty file": Refusal(
        lambda folder: two(folder, write(folder / "b.jsonl", "")), "`runs` has '{tmp}/b.jsonl', which has no records."
    ),
    "no text": Refusal(
        lambda folder: two(folder, write(folder / "b.jsonl", b"\xff\n")),
        "`runs` has '{tmp}/b.jsonl', which cannot be read: ...",
    ),
    "damaged file": Refusal(
        lambda folder: two(folder, write(folder / "b.jsonl.gz", gzip.compress(bytes(99))[:10] + b"\xff" * 99)),
        "`runs` has '{tmp}/b.jsonl.gz', which cannot be read: Error -3 while decompressing data: invalid block type",
    ),
    "rows instead of records": Refusal(
        lambda folder: two(folder, write(folder / "b.jsonl", '{"prompt": "a", "output": "b"}\n')),
        "line 1 of {tmp}/b.jsonl is not a record of a generation: no value for `response`.",
    ),
    "a reward that is text": Refusal(
        lambda folder: two(folder, write(folder / "b.jsonl", line() + line(reward="1"))),
        "line 2 of {tmp}/b.jsonl is not a record of a generation: `reward` is '1', expected a number or null.",
    ),
    "output": Refusal(
        lambda folder: compare_runs(["x", "y"], "page.jsonl"),
        "`output` is 'page.jsonl', expected a file ending in .html.",
    ),
}


@each(REFUSED)
def test_what_cannot_be_compared_is_told_in_one_line(refusal, tmp_path):
    refusal.check(tmp_path)


def test_a_value_that_was_no_finite_number_is_not_known(tmp_path):
    write(tmp_path / "b.jsonl", line(token_entropy=None, token_log_probs=[None, -1.0]) + "\n" + line(sample=1)[:-1])
    found = two(tmp_path, tmp_path / "b.jsonl")
    assert math.isnan(found.summaries[1]["response_entropy"])
    responses = page_data(found.page)["prompts"][0]["responses"][1]
    assert [(each["token_entropy"], each["log_prob"]) for each in responses] == [(None, -1.0), (0.5, -1.0)]
