"""`SFTModule` against a plain PyTorch loop, in every layout and split of a step."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from support.fits import ROWS, fit, make_data, make_trainer, sgd
from support.models import tiny_config, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from lightning_sft import GenerationMonitor, Sampling, SFTModule


def never(response, ground_truth):
    return {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}


def reference_losses(model, batches, normalization, constant, max_norm, lr):
    """Plain PyTorch: one row at a time, natural log-softmax, no masks at all."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    num_steps = len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, num_steps)
    losses = []
    for rows in batches:
        optimizer.zero_grad()
        nll, num_tokens = 0.0, 0
        for row in rows:
            prompt, output = [ord(c) for c in row["prompt"]], [ord(c) for c in row["output"]] + [128]
            logits = model(torch.tensor([prompt + output])).logits[0].double()
            for i, token in enumerate(output):
                nll = nll - F.log_softmax(logits[len(prompt) + i - 1], dim=-1)[token]
                num_tokens += 1
        loss = nll / (num_tokens if normalization == "token" else constant * len(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("normalization", "constant"), [("token", 1.0), ("sequence", 7.0)])
@pytest.mark.parametrize("rule", [{}, {"gradient_accumulation_steps": 3}, {"max_tokens_per_microbatch": 80}])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_training_equals_a_plain_loop_however_a_step_is_split(tmp_path, normalization, constant, rule, layout):
    torch.manual_seed(1)
    reference = tiny_model()
    module = SFTModule(
        tiny_model(),
        optimizer=sgd,
        lr_scheduler="cosine",
        warmup_steps=2,
        max_grad_norm=0.5,
        loss_normalization=normalization,
        normalize_constant=constant,
    )
    module.model.load_state_dict(reference.state_dict())
    _, recorder, _ = fit(tmp_path, module, make_data(layout=layout, **rule))
    by_ids = {tuple(ord(c) for c in row["prompt"] + row["output"]): row for row in ROWS}
    batches = [[by_ids[ids] for ids in step] for step in recorder.rows]
    assert [len(rows) for rows in batches] == [8, 8, 6] * 2
    expected = reference_losses(reference, batches, normalization, constant, max_norm=0.5, lr=0.3)
    assert recorder.losses == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(module.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", [{}, {"gradient_accumulation_steps": 3}])
def test_packed_and_padded_runs_log_the_same(tmp_path, rule):
    logged = []
    for layout in ("packed", "padded"):
        data = make_data(layout=layout, val_data=ROWS[:7], **rule)
        _, recorder, trainer = fit(tmp_path / layout, data=data, max_steps=4)
        logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        assert recorder.layouts == {layout}
    packed, padded = logged
    assert {"train/token_entropy", "train/grad_norm", "val/loss", "val/token_accuracy", "val/perplexity"} < set(packed)
    assert packed == pytest.approx(padded, rel=1e-4)


def test_by_default_rows_are_packed_where_the_model_can_take_it(tmp_path, caplog):
    assert fit(tmp_path, max_steps=1)[1].layouts == {"packed"}
    eager = SFTModule(tiny_config(), optimizer=sgd, model_kwargs={"attn_implementation": "eager"})
    assert fit(tmp_path, eager, max_steps=1)[1].layouts == {"padded"}
    assert "Batches are padded: LlamaForCausalLM uses `eager` attention." in caplog.text
    with pytest.raises(
        ValueError, match=r"`layout` is 'packed', but LlamaForCausalLM uses `eager` attention\. Use 'padded'"
    ):
        fit(tmp_path, SFTModule(eager.model), make_data(layout="packed"), max_steps=1)


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # everything but code in C++, which takes a minute to compile
        pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER]),
    ],
)
def test_compiled_blocks_train_and_validate_the_same_and_generate_as_they_are(tmp_path, monkeypatch, backend):
    compile_with, runs = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_with(self, backend=backend, **options))
    for compiled in (False, True):
        module = SFTModule(tiny_config(), optimizer=sgd, compile=compiled)
        monitor = GenerationMonitor(reward_fn=never, num_prompts=2, sampling=Sampling(4))
        data = make_data(val_data=ROWS[:5])
        _, recorder, trainer = fit(tmp_path, module, data, [monitor], max_steps=4, val_check_interval=2)
        runs.append([*recorder.losses, trainer.callback_metrics["val/loss"].item()])
    assert all(block._compiled_call_impl is not None for block in module.model.model.layers)
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_packed_row_may_be_longer_than_the_model_has_positions_but_no_document(tmp_path):
    data = [{"prompt": "p" * 30, "output": "o" * 20}] * 3  # 51 tokens each, 64 positions
    fit(tmp_path, data=make_data(train_data=data), max_steps=1)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*data, {"prompt": "p" * 50, "output": "o" * 20}]))
    for more in ({}, {"val_fraction": 0.5}):
        with pytest.raises(
            ValueError, match=r"^line 4 of \S+rows\.jsonl: The row has 71 tokens, but the model has only"
        ):
            fit(tmp_path, data=make_data(train_data=str(path), **more), max_steps=1)


def test_validation_rows_are_held_against_the_positions_before_the_first_step(tmp_path):
    steps = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_):
            steps.append(1)

    data = make_data(val_data=[ROWS[0], {"prompt": "p" * 80, "output": "o"}])
    with pytest.raises(
        ValueError, match=r"^row 2 of `val_data`: The row has 82 tokens, but the model has only 64 posi"
    ):
        fit(tmp_path, SFTModule(tiny_config()), data, [Count()], max_steps=2, num_sanity_val_steps=0)
    assert not steps


def test_a_streamed_row_that_is_too_long_is_named_when_it_is_read(tmp_path):
    rows = [{"prompt": "p", "output": "o" * (80 if line == 7 else 3)} for line in range(1, 13)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = make_data(train_data=str(path), batch_size=2, streaming=True)
    with pytest.raises(
        ValueError, match=r"^line 7 of \S+rows\.jsonl: The row has 82 tokens, but the model has only 64 positions"
    ):
        fit(tmp_path, SFTModule(tiny_config(), lr_scheduler="constant", warmup_steps=0), data, max_steps=6)


def test_each_epoch_shows_every_row_once_in_an_order_of_its_own(tmp_path):
    _, recorder, _ = fit(tmp_path)
    first, second = [[row for step in recorder.rows[i : i + 3] for row in step] for i in (0, 3)]
    assert sorted(first) == sorted(second) == sorted(tuple(map(ord, row["prompt"] + row["output"])) for row in ROWS)
    assert recorder.rows[0] != recorder.rows[3]


def test_the_model_trains_with_dropout_on_although_it_came_in_eval_mode(tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(all(module.training for module in pl_module.model.modules()))

    model = tiny_model(attention_dropout=0.5).eval()
    fit(tmp_path, SFTModule(model, optimizer=sgd), callbacks=[Watch()], max_steps=2)
    assert seen == [True, True]


def test_dropout_is_drawn_anew_each_step_and_is_the_same_in_each_run(tmp_path):
    def losses(rate, seed=0):
        torch.manual_seed(5)
        module = SFTModule(tiny_model(attention_dropout=rate), optimizer=sgd, seed=seed)
        return fit(tmp_path, module, max_steps=3)[1].losses

    assert losses(0.5) == losses(0.5)
    assert losses(0.5) != losses(0.5, seed=1)
    assert losses(0.5) != losses(0.0)


def test_a_model_is_trained_after_it_was_evaluated(tmp_path):
    """Evaluations are in inference mode, whose tensors cannot be changed outside of it."""
    module, data = SFTModule(tiny_config(), optimizer=sgd), make_data(val_data=ROWS[:4])
    before = make_trainer(tmp_path).validate(module, data, verbose=False)
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=2)
    trainer.fit(module, data)
    after = make_trainer(tmp_path).validate(module, data, verbose=False)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(after[0]["val/loss"], abs=1e-6)
    assert after[0]["val/loss"] < before[0]["val/loss"]


def test_predict_without_a_generation_monitor_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="`predict` needs a `GenerationMonitor`"):
        make_trainer(Path(tmp_path)).predict(SFTModule(tiny_config()), make_data(predict_data=ROWS))


@pytest.mark.parametrize(("limit", "said"), [({}, "not set"), ({"max_tokens_per_microbatch": 50}, "50")])
def test_memory_that_runs_out_names_the_setting_that_limits_it_and_the_largest_microbatch(tmp_path, limit, said):
    sizes = []

    class RunOut(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            def run_out(*args):
                raise torch.OutOfMemoryError("CUDA out of memory.")

            if batch_idx == 1:
                sizes.extend(microbatch.input_ids.numel() for microbatch in batch.microbatches)
                next(pl_module.parameters()).register_hook(run_out)

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        fit(tmp_path, data=make_data(**limit), callbacks=[RunOut()])
    (note,) = caught.value.__notes__
    assert f"step has {max(sizes)} tokens on this device, and `data.max_tokens_per_microbatch` is {said}. " in note
    assert f"Set it to less than {max(sizes)}: " in note
    assert "`lightning-sft find_batch_size` finds" in note
