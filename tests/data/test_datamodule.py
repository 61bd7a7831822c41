"""`SFTDataModule`: rows to optimizer steps, and what it refuses."""

import json

import lightning as L
import pytest
import torch
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_config

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.rows.prompts import Prompt

ROWS = [{"prompt": f"{i:02d}", "output": "x" * (1 + i % 5), "ground_truth": str(i)} for i in range(20)]
EOS = 128


def prepared(stage="fit", **changes):
    data = SFTDataModule(character_tokenizer(), **({"train_data": ROWS, "batch_size": 6} | changes))
    data.setup(stage)
    return data


def rows_of(batch):
    """Prompt numbers in a batch, read off the ids."""
    return [
        int("".join(map(chr, row[:2].tolist()))) for microbatch in batch.microbatches for row in microbatch.input_ids
    ]


def test_rows_are_those_of_the_tokenizer_as_it_is_now():
    """As where a notebook shows them, and the tokenizer's settings are then changed."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    tokenizer = character_tokenizer(pad=True)
    data = SFTDataModule(tokenizer, rows)
    for mark, eos in (("?", "<eos>"), ("!", "<eos>"), ("!", "<pad>")):
        tokenizer.chat_template = "{% for each in messages %}{{ each.content }}" + mark + "{% endfor %}"
        tokenizer.eos_token = eos
        assert data.prompts("fit")[0].text == f"a{mark}"
        assert tokenizer.decode(data.training_rows.rows[0]["input_ids"]) == f"a{mark}b{mark}{eos}"
    data.tokenizer = character_tokenizer(bos=True)
    data.tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    assert data.prompts("fit")[0].text == "<bos>a!"


def test_a_batch_is_one_optimizer_step_with_its_totals():
    batches = list(prepared(gradient_accumulation_steps=2).train_dataloader())
    assert [batch.totals.num_sequences for batch in batches] == [6, 6, 6, 2]
    assert sorted(row for batch in batches for row in rows_of(batch)) == list(range(20))
    for batch in batches:
        assert len(batch.microbatches) == 2
        numbers = rows_of(batch)
        assert batch.totals.num_response_tokens == sum(1 + n % 5 + 1 for n in numbers)  # with EOS
        assert batch.totals.num_response_tokens == sum(int(m.response_mask.sum()) for m in batch.microbatches)
        assert batch.totals.num_tokens == sum(2 + 1 + n % 5 for n in numbers)  # what the model reads


def test_without_a_model_batches_are_padded_and_a_wrong_layout_is_named():
    (microbatch,) = next(iter(prepared().train_dataloader())).microbatches
    assert microbatch.packing is None
    assert microbatch.num_sequences == 6
    assert microbatch.response_positions.tolist() == microbatch.response_mask.flatten().nonzero()[:, 0].tolist()
    with pytest.raises(ValueError, match="`layout` is 'pakced', expected one of packed, padded"):
        prepared(layout="pakced")
    with pytest.raises(ValueError, match="`layout` is 'packed', but there is no module that takes packed batches"):
        prepared(layout="packed").train_dataloader()


def test_after_a_fit_the_batches_of_a_loop_of_ones_own_are_padded_as_before_it(tmp_path):
    """A packed row looks the same, but is wrong for whoever calls the model without saying where its sequences end."""

    class Layouts(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.is_packed = batch.microbatches[0].packing is not None

    data, layouts = SFTDataModule(character_tokenizer(), ROWS, ROWS, batch_size=6), Layouts()
    make_trainer(tmp_path, max_steps=1, callbacks=[layouts]).fit(SFTModule(tiny_config()), data)
    assert layouts.is_packed
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader)).microbatches[0].packing is None
    data = SFTDataModule(character_tokenizer(), ROWS, layout="packed")
    make_trainer(tmp_path, max_steps=1).fit(SFTModule(tiny_config()), data)
    assert next(iter(data.train_dataloader())).microbatches[0].packing is not None  # they are asked for


def test_loaders_need_no_setup_and_the_rows_say_what_they_are():
    data = SFTDataModule(character_tokenizer(), ROWS, ROWS[:7], "test.jsonl", batch_size=6)
    assert [batch.totals.num_sequences for batch in data.val_dataloader()] == [6, 1]
    assert str(data) == "train_data: 20 rows\nval_data: 7 rows\ntest_data: test.jsonl"
    with pytest.raises(ValueError, match="`test_data` is needed"):
        SFTDataModule(character_tokenizer(), ROWS).test_dataloader()


def test_workers_change_nothing():
    here, there = (list(prepared(num_workers=n, max_tokens_per_microbatch=30).train_dataloader()) for n in (0, 2))
    for one, other in zip(here, there, strict=True):
        for a, b in zip(one.microbatches, other.microbatches, strict=True):
            assert a.locations == b.locations
            for name in ("input_ids", "labels", "response_mask", "response_positions"):
                assert torch.equal(getattr(a, name), getattr(b, name))


def test_without_a_trainer_every_whole_pass_is_the_next_epoch(tmp_path):
    data = prepared(val_data=ROWS[:6])
    loader, validation = data.train_dataloader(), data.val_dataloader()
    next(iter(loader))
    passes = [[row for batch in loader for row in rows_of(batch)] for _ in range(2)]
    assert passes[0] == [row for batch in prepared().train_dataloader() for row in rows_of(batch)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])
    orders = [[row for batch in validation for row in rows_of(batch)] for _ in range(2)]
    assert orders[0] == orders[1]

    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.extend(rows_of(batch))

    loader = prepared().train_dataloader()
    make_trainer(tmp_path, max_epochs=2, callbacks=[Watch()]).fit(SFTModule(tiny_config()), loader, validation)
    assert seen == passes[0] + passes[1]


def test_the_order_follows_from_the_seed():
    def order(seed):
        return [row for batch in prepared(seed=seed).train_dataloader() for row in rows_of(batch)]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_validation_rows_come_in_the_order_of_the_file():
    batches = list(prepared(val_data=ROWS[:10], batch_size=4).val_dataloader())
    assert [sorted(rows_of(batch)) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_fraction_is_split_off_by_seed():
    def split(seed):
        data = prepared(val_fraction=0.3, seed=seed)
        train, val = (
            sorted(row for batch in loader for row in rows_of(batch))
            for loader in (data.train_dataloader(), data.val_dataloader())
        )
        assert sorted(train + val) == list(range(20))
        assert len(val) == 6
        return val

    assert split(1) == split(1)
    assert split(1) != split(2)


@pytest.mark.parametrize(
    ("too_long", "kept", "message"),
    [("drop", 12, "train_data: dropped 8 of 20 rows"), ("truncate", 20, "train_data: truncated 8 of 20 rows")],
)
def test_what_happens_to_long_rows_is_told(too_long, kept, message, caplog):
    data = prepared(max_length=6, too_long=too_long)  # outputs of 4 and 5 characters are too long
    batches = list(data.train_dataloader())
    assert sum(batch.totals.num_sequences for batch in batches) == kept
    assert message in caplog.text
    assert "longer than `max_length` = 6 tokens" in caplog.text
    assert ("lose the end and the EOS" in caplog.text) == (too_long == "truncate")
    lengths = [len(row) for batch in batches for mb in batch.microbatches for row in mb.input_ids]
    assert max(lengths) == 5


def test_nothing_is_said_where_nothing_is_lost(caplog):
    prepared(max_length=8, too_long="drop")
    assert "train_data" not in caplog.text


def test_when_every_row_is_too_long_it_is_an_error():
    with pytest.raises(ValueError, match=r"`train_data`: all 20 rows are longer than `max_length` = 3 tokens. Raise"):
        prepared(max_length=3, too_long="drop")


def test_prompts_to_predict_need_no_output_and_default_to_the_validation_rows(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"question": "a"}\n{"question": "b", "ground_truth": "2"}\n')
    named = prepared("predict", predict_data=str(tmp_path / "prompts.jsonl"), prompt_template="Q: {question}")
    expected = [
        Prompt(0, "Q: a", None, as_written=False),
        Prompt(1, "Q: b", "2", as_written=False),
    ]
    assert list(named.predict_dataloader()) == [expected]
    (prompts,) = prepared("predict", val_data=ROWS[:2]).predict_dataloader()
    assert prompts == [Prompt(0, "00", "0"), Prompt(1, "01", "1")]


def test_predicting_without_any_prompts_names_the_argument_that_is_missing():
    with pytest.raises(ValueError, match="`predict_data` is needed for predict"):
        prepared("predict")


def test_a_bad_prompt_to_predict_is_located(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*prompts.jsonl: `prompt` .* is 3 of type int"):
        prepared("predict", predict_data=str(tmp_path / "prompts.jsonl"))


@pytest.mark.parametrize(("stage", "name"), [("fit", "train_data"), ("validate", "val_data"), ("test", "test_data")])
def test_missing_data_is_named(stage, name):
    with pytest.raises(ValueError, match=f"`{name}` is needed for {stage}"):
        SFTDataModule(character_tokenizer()).setup(stage)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": None}, "`tokenizer` is missing"),
        ({"batch_size": 0}, "`batch_size` is 0, expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0, expected at least 1"),
        ({"gradient_accumulation_steps": 2, "max_tokens_per_microbatch": 9}, "Give one of them"),
        ({"too_long": "cut"}, "`too_long` is 'cut', expected one of error, drop, truncate"),
        ({"val_fraction": 1.0}, "`val_fraction` is 1.0"),
        ({"val_fraction": 0.1, "val_data": ROWS}, "Both `val_data` and `val_fraction`"),
        ({"max_length": 1}, "`max_length` is 1"),
        ({"prompt_template": "none.txt"}, "`prompt_template` is 'none.txt'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        SFTDataModule(**({"tokenizer": character_tokenizer(), "train_data": ROWS} | arguments))


def test_a_row_over_the_budget_is_an_error_before_training():
    with pytest.raises(ValueError, match=r"`max_tokens_per_microbatch` is 5, but example \d+ has 7 tokens"):
        prepared(max_tokens_per_microbatch=5)


def test_a_tokenizer_that_cannot_be_loaded_is_named():
    with pytest.raises(ValueError, match="`tokenizer` is 'no/where', which cannot be loaded"):
        SFTDataModule("no/where", train_data=ROWS).setup("fit")


def test_a_tokenizer_without_eos_is_named():
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"the tokenizer has no EOS token. Set `tokenizer.eos_token`, or pass"):
        SFTDataModule(tokenizer, train_data=ROWS).setup("fit")


def test_the_gsm8k_rows_become_the_r1_zero_form(tmp_path):
    from lightning_sft.examples import r1_zero_row

    row = {"question": "How many?", "answer": "2*3 = <<2*3=6>>6\nso 1,000+6\n#### 1,006"}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row))
    data = prepared(train_data=str(path), row_transform=r1_zero_row, prompt_template="User: {question}\nA: <think>")
    (prompt,) = data.prompts("fit")
    assert prompt == Prompt(0, "User: How many?\nA: <think>", "1006")
    (batch,) = data.train_dataloader()
    (microbatch,) = batch.microbatches
    response = microbatch.labels[microbatch.response_mask].tolist()
    expected = " 2*3 = 6\nso 1,000+6 </think> <answer> 1006 </answer>"
    assert response == [*map(ord, expected), EOS]


@pytest.mark.parametrize("answer", ["six", "six ####"])
def test_a_gsm8k_row_without_its_mark_or_an_answer_after_it_is_located(answer):
    from lightning_sft.examples import r1_zero_row

    with pytest.raises(ValueError, match=f"row 1 of `train_data`: `answer` is '{answer}', expected GSM8K"):
        prepared(train_data=[{"question": "?", "answer": answer}], row_transform=r1_zero_row, prompt_field="question")


def test_prompts_are_there_before_a_stage_begins():
    rows = [{"prompt": "a", "output": "b"}, {"prompt": "c", "output": "d"}]
    assert [each.text for each in SFTDataModule(character_tokenizer(), rows).prompts("fit")] == ["a", "c"]
    data = SFTDataModule(character_tokenizer(), val_data=rows)
    assert [each.text for each in data.prompts("validate", 1)] == ["a"]
    assert data.prompts("predict", 0) == []
