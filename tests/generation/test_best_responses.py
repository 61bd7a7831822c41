"""A model's own responses become rows: the best of each prompt, each once, whatever the file or the device."""

import json
import random
from pathlib import Path

import pytest
from support.models import character_tokenizer
from support.records import made_up_record

from lightning_sft import SettingsError, SFTDataModule, best_responses, is_rewarded
from lightning_sft.cli.app import run_command
from lightning_sft.errors import MissingFileError, SettingsTypeError
from lightning_sft.generation.records import write_records

EOS = "<eos>"


def record(prompt, response, reward, stop_reason="eos", **changes):
    tokens = [*response, EOS] if stop_reason == "eos" else response
    return made_up_record(prompt, [*tokens], reward, response=response, stop_reason=stop_reason, **changes)


RECORDS = [
    record("b", "x", 1.0),
    record("b", "y", 0.0),
    record("b", "x", 1.0, sample=2),  # said before
    record("b", "z", 2.0),
    record("a", "u", 1.0, "stop"),
    record("a", "v", 1.0, "length"),  # cut off
    record("a", "x", 1.0),
    record("c", "w", 0.5),
]


def outputs(rows):
    return [(row["prompt"], row["output"]) for row in rows]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("b", "z<eos>"), ("a", "u")]),
        ({"per_prompt": 2}, [("b", "z<eos>"), ("b", "x<eos>"), ("a", "u"), ("a", "x<eos>")]),
        ({"min_reward": 0.5}, [("b", "z<eos>"), ("a", "u"), ("c", "w<eos>")]),
        (
            {"min_reward": 0, "per_prompt": 9},
            [("b", o + EOS) for o in "zxy"] + [("a", "u"), ("a", "x<eos>"), ("c", "w<eos>")],
        ),
        ({"min_reward": 3.0}, []),
    ],
)
@pytest.mark.parametrize("kind", ["records", "file", "files"])
def test_of_each_prompt_the_best_are_chosen_each_once(tmp_path, options, expected, kind):
    data = RECORDS
    if kind != "records":
        cut = len(RECORDS) if kind == "file" else 3
        write_records(tmp_path / "1.jsonl", RECORDS[:cut], run="abc")
        write_records(tmp_path / "2.jsonl", RECORDS[cut:] or RECORDS[:1], run="abd")
        data = str(tmp_path / "*.jsonl")
    rows = best_responses(data, **options)
    assert outputs(rows) == expected
    assert all(set(row) == {"prompt", "output", "ground_truth", "reward"} for row in rows)


def test_they_are_those_of_a_naive_choice():
    rng = random.Random(0)
    records = [
        record(rng.choice("abcd"), rng.choice("uvwxyz"), rng.choice([0.0, 1.0]), rng.choice(["eos", "length"]))
        for _ in range(200)
    ]
    good = {}
    for each in records:
        if each.reward == 1.0 and each.stop_reason == "eos":
            good.setdefault(each.prompt, {})[each.response + EOS] = True
    prompts = dict.fromkeys(each.prompt for each in records)
    expected = [(prompt, output) for prompt in prompts for output in [*good.get(prompt, {})][:3]]
    assert outputs(best_responses(records, per_prompt=3)) == expected


def test_the_rows_teach_exactly_what_was_said():
    rows = best_responses(RECORDS, per_prompt=2)
    data = SFTDataModule(character_tokenizer(), rows)
    data.setup("fit")
    assert [ids[-2:] for ids in data.training_rows.rows["input_ids"][:]][:2] == [[122, 128], [120, 128]]


def test_records_themselves_are_rows_by_the_settings_of_the_datamodule(tmp_path):
    write_records(tmp_path / "records.jsonl", RECORDS, run="abc")
    options = {"output_field": "response", "row_filter": is_rewarded}
    data = SFTDataModule(character_tokenizer(), str(tmp_path / "records.jsonl"), **options)
    data.setup("fit")
    rows = data.training_rows.rows
    assert list(zip(rows["prompt"], rows["output"], strict=True)) == [(p, o) for p, o in ("bx", "bx", "bz", "au", "ax")]
    with pytest.raises(SettingsError, match=r"^row 1 of `train_data`: expected a record of `predict`"):
        SFTDataModule(character_tokenizer(), [{"prompt": "a", "response": "b"}], **options).setup("fit")


def test_the_command_writes_rows_and_says_what_became_of_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(Path("records.jsonl"), RECORDS, run="abc")
    words = ["best_responses", "--records", "records.jsonl", "--output", "rows/1.jsonl", "--per_prompt", "2"]
    run_command(words)
    written = Path("rows/1.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == best_responses(RECORDS, per_prompt=2)
    assert capsys.readouterr().out == (
        "8 responses: 5 with enough reward, 4 of them different; 4 chosen, to 2 of 3 prompts.\nRows: rows/1.jsonl\n"
    )
    run_command(words)
    assert Path("rows/1.jsonl").read_text() == written
    with pytest.raises(SettingsError, match="no response has a reward of at least 3 and has ended"):
        run_command([*words, "--min_reward", "3"])
    with pytest.raises(SettingsError, match=r"`output` is 'records.jsonl', which holds records"):
        run_command([*words, "--output", "records.jsonl"])
    fewer = {name: value for name, value in RECORDS[0].to_json().items() if not name.startswith("token_")}
    Path("fewer.jsonl").write_text(json.dumps(fewer) + "\n")  # some leave the tokens out
    with pytest.raises(SettingsError, match=r"`output` is 'fewer.jsonl', which holds records"):
        run_command(["best_responses", "--records", "fewer.jsonl", "--output", "fewer.jsonl"])
    with pytest.raises(SettingsError, match=r"`output` is 'a.csv'; expected a file ending in .jsonl"):
        run_command([*words, "--output", "a.csv"])
    with pytest.raises(
        SettingsError, match=r"`output` is 'records.jsonl/a.jsonl', which cannot be written: File exists"
    ):
        run_command([*words, "--output", "records.jsonl/a.jsonl"])


def test_what_holds_no_records_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for content, message in (
        ('{"prompt": "a", "output": "b"}\n', r"line 1 of .* is not a record of `predict`: no value for `response`\.$"),
        (
            '{"prompt": "a", "response": "b", "reward": "1", "stop_reason": "eos"}\n',
            r"line 1 of .* is not a record of `predict`: `reward` is '1', expected a number or null\.$",
        ),
        ("[1]\n", r"line 1 of .*: expected a JSON object, got \[1\]"),
    ):
        path.write_text(content)
        with pytest.raises(SettingsError, match=message):
            best_responses(str(path))
    for name, content, message in (("a.jsonl", "", "it has no rows."), ("a.json", "[1,", "Expecting value: line 1 ")):
        (tmp_path / name).write_text(content)
        with pytest.raises(SettingsError, match=f"^`records`: cannot read {tmp_path / name}: {message}"):
            best_responses(str(tmp_path / name))
    with pytest.raises(MissingFileError, match=r"`records` is 'none.jsonl', but there is no such file"):
        best_responses("none.jsonl")
    with pytest.raises(SettingsError, match="`records` is 'user/set', expected a file that `predict` has written"):
        best_responses("user/set")
    with pytest.raises(SettingsTypeError, match="`records` is 3 of type int, expected a file, a pattern"):
        best_responses(3)
    with pytest.raises(SettingsTypeError, match="`records` has 3 of type int, expected only files or only records"):
        best_responses([3])
    with pytest.raises(SettingsError, match="`per_prompt` is 0, expected at least 1"):
        best_responses(RECORDS, per_prompt=0)
    with pytest.raises(
        SettingsError, match=r"`records` has 1 response, none of them with a reward. Rows whose prompts"
    ):
        best_responses([record("a", "b", None)])
