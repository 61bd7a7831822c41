"""Rows under a model: scores against plain logits, on one device and two, and wrong labels among the hardest rows."""

import json
import math
import random

import lightning as L
import pytest
import torch
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_config, tiny_model
from support.processes import Processes
from support.refusals import Refusal, each

from lightning_sft import GenerationMonitor, SFTDataModule, SFTModule, inspect_rows
from lightning_sft.inspection import inspect_rows as inspect_rows_module

WORDS = ["tree", "a", "stone river", "of", "light and day"]
ROWS = [{"prompt": f"{i}:" + "p" * (i % 4), "output": WORDS[i % 5]} for i in range(21)]
CHAT = [
    {"messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "no?"}, {"role": "assistant", "content": "ok!"},
    ]}
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + message.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def inspect(folder, model=None, rows=ROWS, split="train", trainer=(), num_rows=1000, **data):
    module = SFTModule(tiny_model() if model is None else model)
    given = {"train": {"train_data": rows}, "val": {"train_data": rows[:1], "val_data": rows}}[split]
    options = {"batch_size": 4} | given | data
    datamodule = SFTDataModule(character_tokenizer(), **options)
    return inspect_rows(make_trainer(folder, **dict(trainer)), module, datamodule, split, num_rows, folder)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_each_row_is_scored_as_by_plain_logits(tmp_path, layout):
    torch.manual_seed(0)
    model = tiny_model()
    found = inspect(tmp_path, model, layout=layout, max_tokens_per_microbatch=40)
    lines = read(found.rows)
    assert [line["index"] for line in lines] == list(range(21))
    model.eval()
    total = number = 0.0
    for line, row in zip(lines, ROWS, strict=True):
        ids = [ord(char) for char in row["prompt"] + row["output"]] + [128]
        start = len(row["prompt"])
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        labels = torch.tensor(ids[start:])
        expected = log_p[start - 1 : -1].gather(-1, labels[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(-1)[start - 1 : -1]
        assert line["location"] == f"row {line['index'] + 1} of `train_data`"
        assert (line["prompt"], line["response"]) == (row["prompt"], row["output"] + "<eos>")
        assert (line["token_ids"], "".join(line["tokens"])) == (ids[start:], row["output"] + "<eos>")
        assert line["token_log_probs"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert line["token_entropies"] == pytest.approx(entropy.tolist(), abs=1e-4)
        assert line["loss"] == pytest.approx(-expected.mean().item(), rel=1e-5)
        assert line["token_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
        top = (log_p[start - 1 : -1].argmax(-1) == labels).double().mean().item()
        assert line["accuracy"] == pytest.approx(top)
        assert (line["num_tokens"], line["response_length"]) == (len(ids), len(ids) - start)
        total, number = total - expected.sum().item(), number + len(expected)
    assert found.summary["loss"] == pytest.approx(total / number, rel=1e-5)
    assert found.summary["num_rows"] == 21
    page = json.loads(found.page.read_text().partition('id="data">')[2].partition("</script>")[0])
    hardest = sorted(lines, key=lambda line: -line["loss"])
    assert [row["index"] for row in page["rows"]] == [line["index"] for line in hardest]
    assert sum(row["share"] for row in page["rows"]) == pytest.approx(100, abs=2e-3)


def test_tokens_between_two_learnt_turns_have_no_scores(tmp_path):
    found = inspect(tmp_path, rows=CHAT, chat_template=TEMPLATE)
    (line,) = read(found.rows)
    assert line["prompt"] == "uhi<eos>a"
    assert line["response"] == "yes<eos>uno?<eos>aok!<eos>"
    learnt = [score is not None for score in line["token_log_probs"]]
    assert learnt == [True] * 4 + [False] * 6 + [True] * 4
    assert line["response_length"] == 8


def test_weights_leave_no_row_out_and_the_page_has_the_hardest(tmp_path):
    for name in ("a", "b"):
        rows = [{"prompt": name, "output": word} for word in WORDS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {str(tmp_path / "a.jsonl"): 0.4, str(tmp_path / "b.jsonl"): 2.0}
    found = inspect(tmp_path, train_data=sources, num_rows=3)
    lines = read(found.rows)
    assert [line["location"] for line in lines] == [
        f"line {i} of {tmp_path}/{n}.jsonl" for n in "ab" for i in range(1, 6)
    ]
    page = json.loads(found.page.read_text().partition('id="data">')[2].partition("</script>")[0])
    assert [row["index"] for row in page["rows"]] == [
        line["index"] for line in sorted(lines, key=lambda line: (-line["loss"], line["index"]))[:3]
    ]
    assert page["num_rows"] == 10


def inspect_in_process(folder, **trainer):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inspect(folder, tiny_model(), split="val", trainer=trainer)


def test_two_devices_find_what_one_does(tmp_path):
    inspect_in_process(tmp_path / "one")
    two = Processes(inspect_in_process, tmp_path / "two", devices=2, strategy="ddp", world_size=2)
    assert two.wait() == [0, 0]
    one, other = (read(tmp_path / name / "val_step_0.jsonl") for name in ("one", "two"))
    assert len(one) == 21
    for line, same in zip(one, other, strict=True):
        assert line["token_log_probs"] == pytest.approx(same["token_log_probs"], abs=2e-4)
        assert {k: v for k, v in line.items() if isinstance(v, str | int)} == {
            k: v for k, v in same.items() if isinstance(v, str | int)
        }


@pytest.mark.slow
def test_exchanged_answers_are_among_the_hardest_rows(tmp_path):
    """Of 2 % of wrong answers to sums, at least 80 % are among the 3 % of the rows with the highest loss."""
    drawn = random.Random(0)
    pairs = [(drawn.randint(0, 9), drawn.randint(0, 9)) for _ in range(600)]
    rows = [{"prompt": f"{a}+{b}=", "output": f"{a + b:02d}"} for a, b in pairs]
    wrong = drawn.sample(range(600), 12)
    answers = [rows[i]["output"] for i in wrong]
    for i, answer in zip(wrong, answers[1:] + answers[:1], strict=True):
        rows[i] = rows[i] | {"output": answer if answer != rows[i]["output"] else "99"}
    torch.manual_seed(0)
    config = tiny_config(hidden_size=48, intermediate_size=96, num_attention_heads=4)
    module = SFTModule(config, optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3), warmup_steps=5)
    data = SFTDataModule(character_tokenizer(), rows, batch_size=60)
    make_trainer(tmp_path, max_epochs=12).fit(module, data)
    found = inspect_rows(make_trainer(tmp_path), module, data, folder=tmp_path)
    hardest = sorted(read(found.rows), key=lambda line: -line["loss"])[:18]
    assert len({line["index"] for line in hardest} & set(wrong)) >= 0.8 * 12
    assert math.isfinite(found.summary["loss"])


REFUSALS = {
    "another split": Refusal(
        lambda folder: inspect_rows(L.Trainer(), None, None, "all"),
        "`split` is 'all', expected one of train, val, test.",
    ),
    "no rows to show": Refusal(
        lambda folder: inspect_rows(L.Trainer(), None, None, num_rows=0), "`num_rows` is 0, expected at least 1."
    ),
    "no rows to score": Refusal(
        lambda folder: inspect_rows(make_trainer(folder, limit_val_batches=0), None, None),
        "`trainer.limit_val_batches` is 0, so that no row would be scored. Leave it out.",
    ),
}


@each(REFUSALS)
def test_what_cannot_be_inspected_is_refused_by_name(refusal, tmp_path):
    refusal.check(tmp_path)


def test_the_trainer_of_a_run_inspects_without_generating_and_a_row_without_a_loss_hides_no_shares(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, callbacks = tiny_model(), [GenerationMonitor()]
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("2")] = math.nan
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    data = SFTDataModule(character_tokenizer(), ROWS[:4])
    found = inspect_rows(trainer, SFTModule(model), data, folder="~/found")
    assert found.page == tmp_path / "found" / "train_step_0.html"
    assert [each for each in trainer.callbacks if isinstance(each, GenerationMonitor)] == callbacks
    block = found.page.read_text().partition('id="data">')[2].partition("</script>")[0]
    rows = json.loads(block)["rows"]
    assert [row["index"] for row in rows if row["loss"] is None] == [2]
    assert sum(row["share"] for row in rows) == pytest.approx(100, abs=0.01)


def test_a_run_that_fails_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_rows_module.ScoredRow, "of", None)
    with pytest.raises(TypeError):
        inspect(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_streamed_rows_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    with pytest.raises(ValueError, match="`streaming` is true, but `inspect` reads the rows in their order"):
        inspect(tmp_path, train_data=str(file), streaming=True)
