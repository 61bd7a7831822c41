"""`SFTModule` against a plain PyTorch loop, and what users of Lightning expect of a run."""

import math
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from support.models import character_tokenizer, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from lightning_sft import GenerationMonitor, Sampling, SFTDataModule, SFTModule
from lightning_sft.model.lora import add_lora
from lightning_sft.model.pretrained import build_model

WORDS = ["tree", "a", "stone river", "of", "light and day", "to", "grass", "sun moon star", "w", "seas"]
ROWS = [{"prompt": f"{i}:" + "p" * (i % 4), "output": WORDS[i % 10] * (1 + i % 3)} for i in range(22)]


def sgd(params):
    return torch.optim.SGD(params, lr=0.3)


def make_data(**changes):
    return SFTDataModule(character_tokenizer(), **({"train_data": ROWS, "batch_size": 8} | changes))


def make_trainer(folder, **changes):
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(**(options | changes))


def sequences(microbatch):
    """The rows of a padded microbatch, or the documents of a packed one."""
    if microbatch.packing is None:
        return list(microbatch.input_ids)
    return microbatch.input_ids[0].split(microbatch.packing.cu_seq_lens.diff().tolist())


def never(response, ground_truth):
    return {"format_reward": 0.0, "answer_reward": 0.0, "reward": 0.0}


class Recorder(L.Callback):
    """What happened at each optimizer step."""

    def __init__(self):
        self.losses, self.validated, self.rows, self.layouts = [], [], [], set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.layouts |= {"packed" if microbatch.packing else "padded" for microbatch in batch.microbatches}
        ids = [row.tolist() for microbatch in batch.microbatches for row in sequences(microbatch)]
        self.rows.append(sorted(tuple(token for token in row if token != 128) for row in ids))

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)


def fit(folder, module=None, data=None, callbacks=(), ckpt_path=None, **trainer_options):
    module = module or SFTModule(tiny_config(), optimizer=sgd, lr_scheduler="constant", warmup_steps=0)
    recorder = Recorder()
    trainer = make_trainer(folder, callbacks=[recorder, *callbacks], **({"max_epochs": 2} | trainer_options))
    trainer.fit(module, data or make_data(), ckpt_path=ckpt_path)
    return module, recorder, trainer


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


@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_validation_divides_by_what_training_divides_by(tmp_path, normalization):
    """The loss of a run of no learning rate, on the same rows, is that of its validation."""
    module = SFTModule(
        tiny_config(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        loss_normalization=normalization,
        normalize_constant=5.0,
    )
    data = make_data(val_data=ROWS, batch_size=len(ROWS))
    metrics = fit(tmp_path, module, data, max_steps=1)[2].callback_metrics
    assert metrics["val/loss"] == pytest.approx(metrics["train/loss"].item(), rel=1e-5)


def test_by_default_rows_are_packed_where_the_model_can_take_it(tmp_path, caplog):
    assert fit(tmp_path, max_steps=1)[1].layouts == {"packed"}
    eager = SFTModule(tiny_config(), optimizer=sgd, model_kwargs={"attn_implementation": "eager"})
    assert fit(tmp_path, eager, max_steps=1)[1].layouts == {"padded"}
    assert "Batches are padded: LlamaForCausalLM attends by `eager`." in caplog.text
    with pytest.raises(
        ValueError, match=r"`layout` is 'packed', but LlamaForCausalLM attends by `eager`\. Use 'padded'"
    ):
        fit(tmp_path, SFTModule(eager.model), make_data(layout="packed"), max_steps=1)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_a_compiled_body_trains_and_validates_the_same_and_generates_as_it_is(tmp_path):
    runs = []
    for compiled in (False, True):
        module = SFTModule(tiny_config(), optimizer=sgd, compile=compiled)
        monitor = GenerationMonitor(reward_fn=never, num_prompts=2, sampling=Sampling(4))
        data = make_data(val_data=ROWS[:5])
        _, recorder, trainer = fit(tmp_path, module, data, [monitor], max_steps=4, val_check_interval=2)
        runs.append([*recorder.losses, trainer.callback_metrics["val/loss"].item()])
    assert hasattr(module.model.base_model, "_compiled_call_impl")
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_packed_row_may_be_longer_than_the_model_has_positions_but_no_document(tmp_path):
    data = [{"prompt": "p" * 30, "output": "o" * 20}] * 3  # 51 tokens each, 64 positions
    fit(tmp_path, data=make_data(train_data=data), max_steps=1)
    with pytest.raises(ValueError, match="A row has 71 tokens, but the model has only 64 positions"):
        fit(tmp_path, data=make_data(train_data=[*data, {"prompt": "p" * 50, "output": "o" * 20}]), max_steps=1)


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


def test_gradient_checkpointing_recomputes_the_blocks_and_changes_nothing(tmp_path):
    calls = []

    def run(checkpointing):
        torch.manual_seed(5)
        module = SFTModule(tiny_model(), optimizer=sgd, gradient_checkpointing=checkpointing)
        count = []
        block = module.model.model.layers[0].mlp  # counted while it trains, not while it is tried out
        block.register_forward_pre_hook(lambda *_: count.append(1) if torch.is_grad_enabled() else None)
        losses = fit(tmp_path, module, max_steps=2)[1].losses
        calls.append(len(count))
        return losses

    assert run(checkpointing=True) == pytest.approx(run(checkpointing=False), rel=1e-6)
    assert calls == [4, 2]


def test_a_model_is_trained_after_it_was_evaluated(tmp_path):
    """Evaluations are in inference mode, whose tensors cannot be changed outside of it."""
    module, data = (
        SFTModule(tiny_config(), optimizer=sgd),
        SFTDataModule(character_tokenizer(), ROWS, val_data=ROWS[:4]),
    )
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_steps": 2}
    before = L.Trainer(**options, accelerator="cpu").validate(module, data, verbose=False)
    trainer = L.Trainer(**options, accelerator="cpu")
    trainer.fit(module, data)
    after = L.Trainer(**options, accelerator="cpu").validate(module, data, verbose=False)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(after[0]["val/loss"], abs=1e-6)
    assert after[0]["val/loss"] < before[0]["val/loss"]


def test_models_are_made_in_main_memory_whatever_the_default_device(tmp_path):
    """Lightning makes the training device the default one, where other numbers would be drawn for the same seed."""
    tiny_model().save_pretrained(tmp_path)
    with torch.device("meta"):
        drawn, loaded = build_model(tiny_config(), {}, seed=1), build_model(str(tmp_path), {}, seed=1)
    lora = build_model(tiny_config(), {}, seed=1)
    with torch.device("meta"):
        add_lora(lora, {"r": 2})
    assert {weight.device.type for model in (drawn, loaded, lora) for weight in model.parameters()} == {"cpu"}
    torch.testing.assert_close(drawn.state_dict(), build_model(tiny_config(), {}, seed=1).state_dict())


def test_weights_from_a_configuration_follow_from_the_seed_and_disturb_no_other_randomness():
    def weights(seed):
        module = SFTModule(tiny_config(), seed=seed)
        before = torch.get_rng_state()
        module.configure_model()
        assert torch.equal(before, torch.get_rng_state())
        return module.model.lm_head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    module = SFTModule(str(tmp_path / "half"))
    module.configure_model()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


# -- precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_bfloat16_runs_stay_close_to_float32(tmp_path, precision, dtype):
    losses = []
    for name in ("32-true", precision):
        module, recorder, _ = fit(tmp_path, precision=name, max_steps=3)
        losses.append(recorder.losses)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]
    assert module.model.lm_head.weight.dtype == dtype


def test_rotary_frequencies_stay_in_float32_under_bf16_true(tmp_path):
    module, _, _ = fit(tmp_path, precision="bf16-true", max_steps=1)
    buffers = {name: buffer for name, buffer in module.named_buffers() if "inv_freq" in name}
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    exact = tiny_model().model.rotary_emb.inv_freq
    assert torch.equal(buffers["model.model.rotary_emb.inv_freq"], exact)


@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer would unscale in its step, after the clipping
def test_scaled_gradients_are_clipped_after_unscaling_and_an_overflow_skips_the_schedule_too(tmp_path, fused):
    rates, norms = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(pl_module.lr_schedulers().get_last_lr()[0])
            norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in pl_module.model.parameters())))

    class OneOverflow(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.lm_head.weight.register_hook(
                lambda grad: grad * math.inf if trainer.global_step == 1 else grad
            )

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    module = SFTModule(
        tiny_config(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3, fused=fused),
        lr_scheduler="linear",
        warmup_steps=0,
        max_grad_norm=0.01,
    )
    fit(
        tmp_path,
        module,
        callbacks=[OneOverflow(), Watch()],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        max_steps=4,
    )
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert rates == pytest.approx([0.3 * share for share in (0.75, 0.75, 0.5, 0.25)])


# -- what a Lightning user expects -------------------------------------------------------------------------------


def test_max_epochs_counts_epochs_and_max_steps_counts_optimizer_steps(tmp_path):
    assert fit(tmp_path, max_epochs=3)[2].global_step == 9
    assert fit(tmp_path, max_epochs=-1, max_steps=7)[2].global_step == 7
    assert fit(tmp_path, max_epochs=2, max_steps=100)[2].global_step == 6


def test_the_trainer_is_given_back_as_it_was(tmp_path):
    trainer = fit(tmp_path, max_epochs=2, limit_train_batches=2, data=make_data(val_data=ROWS[:5]))[2]
    assert (trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches) == (2, -1, 2)
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (1.0, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3, 6]),  # at each epoch's end
        ({"val_check_interval": 0.4}, [1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 2}, [2, 4, 6]),
        ({"val_check_interval": 4}, [4]),  # over epochs
        ({"check_val_every_n_epoch": 2}, [6]),
        ({"max_steps": 2}, [2]),  # shorter than an epoch
        ({"limit_train_batches": 2}, [2, 4]),
        ({"limit_val_batches": 0}, []),
    ],
)
def test_validation_runs_when_it_is_expected(tmp_path, options, expected):
    assert fit(tmp_path, data=make_data(val_data=ROWS[:5]), **options)[1].validated == expected


def test_limit_train_batches_takes_the_first_steps_of_each_epoch(tmp_path):
    everything, limited = fit(tmp_path)[1], fit(tmp_path, limit_train_batches=2)[1]
    assert limited.rows == [everything.rows[i] for i in (0, 1, 3, 4)]
    assert fit(tmp_path, limit_train_batches=0.4)[2].global_step == 2


def test_overfit_batches_repeats_the_same_rows(tmp_path):
    module = SFTModule(tiny_config(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.02), lr_scheduler="constant")
    _, recorder, _ = fit(tmp_path, module, overfit_batches=1, max_epochs=30)
    assert len(recorder.rows) == 30
    assert all(rows == recorder.rows[0] for rows in recorder.rows)
    assert recorder.losses[-1] < 0.5 * recorder.losses[0]


def test_fast_dev_run_takes_one_step_and_validates(tmp_path):
    _, recorder, trainer = fit(tmp_path, data=make_data(val_data=ROWS[:5]), fast_dev_run=True)
    assert (trainer.global_step, recorder.validated) == (1, [1])


def test_max_time_ends_a_run_without_a_length(tmp_path):
    module = SFTModule(tiny_config(), lr_scheduler="constant", warmup_steps=0)
    trainer = fit(tmp_path, module, max_epochs=-1, max_time={"seconds": 1})[2]
    assert trainer.global_step > 0


def test_a_schedule_over_a_run_without_a_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`lr_scheduler` is 'cosine'.*Set `max_steps`"):
        fit(tmp_path, SFTModule(tiny_config()), max_epochs=-1, max_time={"seconds": 1})


def test_early_stopping_and_the_best_checkpoint_follow_the_validation_loss(tmp_path):
    module = SFTModule(tiny_config(), optimizer=lambda p: torch.optim.SGD(p, lr=40.0), lr_scheduler="constant")
    stop = EarlyStopping("val/loss", patience=2)
    best = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best", save_on_train_epoch_end=False)
    seen = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["val/loss"].item())

    _, recorder, trainer = fit(
        tmp_path,
        module,
        make_data(val_data=ROWS[:6]),
        callbacks=[Watch(), stop, best],
        enable_checkpointing=True,
        max_epochs=50,
        val_check_interval=1,
    )
    assert trainer.global_step < 150
    assert best.best_model_score.item() == min(seen)
    assert seen.index(min(seen)) == len(seen) - 3
    assert torch.load(best.best_model_path)["global_step"] == recorder.validated[-3]


def test_validation_metrics_are_exact_over_all_response_tokens(tmp_path):
    module = SFTModule(tiny_model(), optimizer=sgd)
    data = make_data(val_data=ROWS[:7], batch_size=3, gradient_accumulation_steps=2)
    trainer = make_trainer(tmp_path)
    (metrics,) = trainer.validate(module, data, verbose=False)
    nll, entropy, top1 = [], [], []
    for row in ROWS[:7]:
        prompt, output = [ord(c) for c in row["prompt"]], [ord(c) for c in row["output"]] + [128]
        with torch.no_grad():
            p = module.model(torch.tensor([prompt + output])).logits[0].double().softmax(-1)
        for i, token in enumerate(output):
            at = p[len(prompt) + i - 1]
            nll.append(-math.log(at[token]))
            entropy.append(-sum(x * math.log(x) for x in at.tolist()))
            top1.append(float(at.argmax() == token))
    mean = sum(nll) / len(nll)
    assert metrics["val/loss"] == pytest.approx(mean, rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-6)
    assert metrics["val/token_entropy"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-6)
    assert metrics["val/token_accuracy"] == pytest.approx(sum(top1) / len(top1))


def test_the_validation_loss_is_normalised_as_the_training_loss(tmp_path):
    module = SFTModule(tiny_model(), loss_normalization="sequence", normalize_constant=3.0)
    data = make_data(val_data=ROWS[:7])
    (metrics,) = make_trainer(tmp_path).validate(module, data, verbose=False)
    num_tokens = sum(len(row["output"]) + 1 for row in ROWS[:7])
    assert metrics["val/loss"] == pytest.approx(math.log(metrics["val/perplexity"]) * num_tokens / (3 * 7), rel=1e-5)


# -- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_without_the_original_weights(tmp_path):
    source = tmp_path / "pretrained"
    tiny_model().save_pretrained(source)
    module, _, trainer = fit(tmp_path, SFTModule(str(source), optimizer=sgd, max_grad_norm=0.25), max_steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    for file in source.iterdir():
        file.unlink()
    loaded = SFTModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.hparams.max_grad_norm == 0.25
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, module(ids).logits)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def module():
        config = tiny_config(attention_dropout=0.2)
        return SFTModule(config, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01), warmup_steps=2)

    straight, straight_log, _ = fit(tmp_path, module(), max_epochs=4)
    data = make_data(num_workers=1)
    trainer = make_trainer(tmp_path, callbacks=[first_log := Recorder()], max_epochs=4)

    class StopAt5(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "five.ckpt", weights_only=False)
                trainer.should_stop = True

    trainer.callbacks.append(StopAt5())
    trainer.fit(module(), data)
    resumed, resumed_log, _ = fit(tmp_path, module(), make_data(), max_epochs=4, ckpt_path=tmp_path / "five.ckpt")
    assert first_log.losses + resumed_log.losses == straight_log.losses
    assert first_log.rows + resumed_log.rows == straight_log.rows
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"batch_size": 4}, "batch_size"), ({"seed": 1}, "seed"), ({"train_data": ROWS[:9]}, "num_rows")],
)
def test_resuming_with_other_data_is_refused(tmp_path, changes, name):
    _, _, trainer = fit(tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=f"`{name}` = .* the run cannot continue"):
        fit(tmp_path, data=make_data(**changes), ckpt_path=tmp_path / "two.ckpt")


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_normalization": "tokens"}, "`loss_normalization` is 'tokens', expected one of token, sequence"),
        ({"normalize_constant": 0.0}, "`normalize_constant` is 0.0, expected a positive number"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` is -1.0"),
        ({"warmup_steps": -1}, "`warmup_steps` is -1"),
        ({"nonfinite": "ignore"}, "`nonfinite` is 'ignore', expected one of error, skip"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SFTModule(tiny_config(), **arguments)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/model", "`model` is 'no/such/model', which cannot be loaded"),
        ({"hidden_size": 8}, "`model` is to be built from .* whose `model_type` is no architecture"),
        ({"model_type": "llamma"}, "'model_type': 'llamma'.* no architecture"),
        (tiny_config(vocab_size=100), "tokenizer has 131 tokens, but the model only 100 embeddings"),
        (tiny_config(max_position_embeddings=8), "the model has only 8 positions. Set `max_length`"),
    ],
)
def test_a_model_that_cannot_be_used_is_named_before_training(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, SFTModule(model))


def test_an_unknown_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`lr_scheduler` is 'cosin'"):
        fit(tmp_path, SFTModule(tiny_config(), lr_scheduler="cosin"))


def test_predict_without_a_generation_monitor_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="`predict` needs a `GenerationMonitor`"):
        make_trainer(Path(tmp_path)).predict(SFTModule(tiny_config()), make_data(predict_data=ROWS))
