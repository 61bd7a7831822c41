"""Several sources with weights: how often each row comes, in which order, and on whom that depends."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from support.models import character_tokenizer
from support.runs import ROWS, read_log, train

from lightning_sft import SFTDataModule
from lightning_sft.data.steps.epoch_order import SourceShare, source_order
from lightning_sft.data.steps.plan import BatchPlan, StepRule, StepTotals


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """`a.jsonl`, 4 rows; `b.jsonl`, 5; and `part0.jsonl` and `part1.jsonl`, 3 each. A row's prompt says where it is."""
    monkeypatch.chdir(tmp_path)
    for name, size in {"a": 4, "b": 5, "part0": 3, "part1": 3}.items():
        rows = [{"prompt": f"{name}{i}", "output": "x" * (1 + 3 * i)} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prepared(train_data, **options):
    data = SFTDataModule(character_tokenizer(), train_data, **({"batch_size": 3} | options))
    data.setup("fit")
    return data


def epoch_of(data, epoch=0):
    """The prompts of an epoch, step by step."""
    plan, prompts = data.training_rows.plan(world_size=1), data.training_rows.rows["prompt"]
    first = epoch * plan.steps_per_epoch
    steps = [plan.step(index).ranks for index in range(first, first + plan.steps_per_epoch)]
    return [[prompts[row] for rank in step for part in rank for row in part] for step in steps]


def flat(epoch):
    return Counter(prompt for step in epoch for prompt in step)


def test_each_source_is_gone_through_as_often_as_its_weight_says(sources):
    """2 x 4, 0.5 x 5 = 2.5, so 2, and 1.5 x 6 over both files of the pattern: 8 + 2 + 9 rows in 7 steps of 3."""
    data = prepared({"a.jsonl": 2, "b.jsonl": 0.5, "part?.jsonl": 1.5})
    epochs = [epoch_of(data, epoch) for epoch in range(4)]
    for epoch in epochs:
        assert [len(step) for step in epoch] == [3] * 6 + [1]
        assert Counter(prompt[:-1][:4] for step in epoch for prompt in step) == {"a": 8, "b": 2, "part": 9}
        assert all(count == 2 for prompt, count in flat(epoch).items() if prompt[0] == "a")
    for first, second in (epochs[:2], epochs[2:]):  # 1.5 and 1.5 are 3
        both = flat(first) + flat(second)
        assert all(both[f"part{part}{row}"] == 3 for part in (0, 1) for row in range(3))
    of_b = [{prompt for prompt in flat(epoch) if prompt[0] == "b"} for epoch in epochs]
    assert [len(rows) for rows in of_b] == [2] * 4
    assert of_b[0].isdisjoint(of_b[1])
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 4


@pytest.mark.parametrize(("size", "taken"), [(4, 2), (5, 2), (3, 4), (5, 8), (7, 7), (12, 18), (7, 1), (2, 9)])
def test_no_row_comes_twice_before_the_others_came_once(size, taken):
    total = np.zeros(size, int)
    for epoch in range(2 * size + 1):
        counts = np.bincount(source_order(size, taken, [3, 0], epoch), minlength=size)
        total += counts
        assert counts.sum() == taken
        assert np.ptp(counts) <= 1
        assert np.ptp(total) <= 1


def test_halves_are_drawn_anew_when_both_have_been_taken():
    halves = {frozenset(source_order(20, 10, [0, 0], epoch).tolist()) for epoch in range(0, 20, 2)}
    assert len(halves) == 10


def test_weights_of_one_are_no_weights(sources):
    plain, weighted = prepared(["a.jsonl", "b.jsonl"]), prepared({"a.jsonl": 1, "b.jsonl": 1.0})
    assert [epoch_of(plain, epoch) for epoch in (0, 1)] == [epoch_of(weighted, epoch) for epoch in (0, 1)]
    assert plain.state_dict() == weighted.state_dict()
    order = np.arange(9, dtype=np.int32)  # what runs of before weights continue with
    np.random.default_rng([0, 1]).shuffle(order)
    assert [row for step in epoch_of(plain, 1) for row in sorted(step)] == [
        row
        for at in (0, 3, 6)
        for row in sorted((["a0", "a1", "a2", "a3"] + [f"b{i}" for i in range(5)])[i] for i in order[at : at + 3])
    ]


def test_the_order_is_that_of_one_device_on_any_number():
    rule, sources = StepRule(4), [SourceShare(5, 10), SourceShare(6, 3)]
    one, three = (BatchPlan(range(1, 12), [1] * 11, rule, world_size=size, sources=sources) for size in (1, 3))
    for index in range(2 * one.steps_per_epoch):
        a, b = ([row for rank in plan.step(index).ranks for part in rank for row in part] for plan in (one, three))
        assert sorted(a) == sorted(b)


def test_validation_rows_are_those_without_weights_and_come_once(sources):
    plain = prepared(["a.jsonl", "b.jsonl"], val_fraction=0.3, batch_size=2)
    data = prepared({"a.jsonl": 3, "b.jsonl": 1}, val_fraction=0.3, batch_size=2)
    held_out = data._rows.val.rows["prompt"]
    assert held_out == plain._rows.val.rows["prompt"]
    expected = Counter({f"a{i}": 3 for i in range(4)} | {f"b{i}": 1 for i in range(5)})
    for prompt in held_out:
        del expected[prompt]
    assert flat(epoch_of(data)) == expected


def test_a_split_may_leave_rows_that_stand_together(sources):
    """Of two sources of two rows each one is left, next to the other or not; a source without rows is refused."""
    for name in "xy":
        rows = [{"prompt": f"{name}{i}", "output": "x"} for i in range(2)]
        (sources / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left = set()
    for seed in range(20):
        try:
            data = prepared({"x.jsonl": 3, "y.jsonl": 1}, val_fraction=0.5, seed=seed)
        except ValueError:  # a source has no rows left
            continue
        x, y = ({f"{name}{i}" for i in range(2)} - set(data._rows.val.rows["prompt"]) for name in "xy")
        assert flat(epoch_of(data)) == {x.pop(): 3, y.pop(): 1}
        left.add(tuple(sorted(flat(epoch_of(data)))))
    assert left == {("x0", "y0"), ("x0", "y1"), ("x1", "y0"), ("x1", "y1")}


def test_what_is_dropped_is_counted_for_each_source_and_before_its_weight(sources, caplog):
    """`max_length` 6: prompt of 2 characters, then 1, 4, 7, ... of output and the EOS: one row of each is left."""
    data = prepared({"a.jsonl": 3, "b.jsonl": 2}, max_length=6, too_long="drop")
    assert "dropped 7 of 9 rows (3 of 4 of a.jsonl, 4 of 5 of b.jsonl), longer than" in caplog.text
    assert flat(epoch_of(data)) == {"a0": 3, "b0": 2}


def test_preview_and_model_card_name_sources_with_their_weights(sources):
    data = prepared({str(sources / "a.jsonl"): 2, "b.jsonl": 0.5})
    text = " ".join(str(data.preview(0)).split())
    assert "a.jsonl (weight 2, 8 rows in each epoch) 4 " in text
    assert "b.jsonl (weight 0.5, 2 rows in each epoch) 5 " in text
    assert "optimizer steps per epoch 4" in text
    assert data.facts()["data"]["train"] == "a.jsonl (weight 2), b.jsonl (weight 0.5)"


def test_sources_that_meet_and_weights_that_give_nothing_are_refused(sources):
    for name in ("./a.jsonl", "*.jsonl"):
        with pytest.raises(ValueError, match=r"`train_data` has .*a.jsonl twice, in 'a.jsonl' and '.*'. Name it once"):
            prepared({"a.jsonl": 1, name: 2})
    with pytest.raises(ValueError, match=r"`train_data\['b.jsonl'\]` is 0.1, which takes none of its 5 rows per epoch"):
        prepared({"a.jsonl": 1, "b.jsonl": 0.1})
    (sources / "b.jsonl").write_text('{"prompt": "b0", "output": "xxxxxxxx"}\n')
    with pytest.raises(ValueError, match=r"`train_data` has no rows of 'b.jsonl' that can be trained on: all are too"):
        prepared({"a.jsonl": 2, "b.jsonl": 1}, max_length=6, too_long="drop")


def test_a_run_goes_on_in_the_middle_of_a_weighted_epoch_and_not_with_other_weights(tmp_path):
    names = {}
    for name, rows in {"a": ROWS[:13], "b": ROWS[13:]}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        names[name] = str(path)
    data = {"train_data": {names["a"]: 2, names["b"]: 0.5}}  # 26 + 15 rows: 6 steps an epoch
    options = {"data": data, "module": {"lr_scheduler": "constant_with_warmup"}}
    straight = train(tmp_path / "straight", **options, max_steps=14)
    train(tmp_path / "parts", **options, max_steps=8)
    for changed in ({names["a"]: 1.5, names["b"]: 0.5}, [names["a"], names["b"]]):
        with pytest.raises(ValueError, match="other weights of the sources in `train_data`: the run cannot continue"):
            train(tmp_path / "parts", data={"train_data": changed}, max_steps=14)
    resumed = train(tmp_path / "parts", **options, max_steps=14)
    assert read_log(tmp_path / "parts" / "steps_0.jsonl") == read_log(tmp_path / "straight" / "steps_0.jsonl")
    torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=0, atol=0)


def test_totals_of_an_epoch_are_of_the_rows_that_it_takes():
    """Two rows of 3 tokens, taken once each, and one of 5, taken twice: 6 + 10 tokens, 2 x 6 + 2 x 15 pairs."""
    plan = BatchPlan([3, 3, 5], [1, 2, 4], StepRule(2), sources=[SourceShare(2, 2), SourceShare(1, 2)])
    assert plan.totals() == StepTotals(num_sequences=4, num_tokens=16, num_response_tokens=11, num_attended=42)
    steps = [vars(plan.step(index).totals) for index in range(plan.steps_per_epoch)]
    assert all(sum(step[name] for step in steps) == total for name, total in vars(plan.totals()).items())


def test_of_a_data_set_with_several_splits_one_must_be_chosen():
    rows = Dataset.from_list(ROWS[:2])
    words = "`train_data` has the data sets ['train', 'test'], expected one. Choose one of them, such as "
    with pytest.raises(TypeError, match=re.escape(words + '`train_data["train"]`.')):
        SFTDataModule(character_tokenizer(), DatasetDict(train=rows, test=rows))
    with pytest.raises(TypeError, match=r"`val_data` has the data sets .* such as `val_data\[\"train\"\]`"):
        SFTDataModule(character_tokenizer(), rows, val_data=DatasetDict(train=rows, test=rows))
