"""A run that continues with a setting that was changed: it takes effect, is refused by name, or does not matter."""

import inspect
import math
from functools import partial

import lightning as L
import pytest
import torch
from support.fits import ROWS, make_data, make_trainer
from support.models import character_tokenizer, tiny_config

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.errors import SettingsError
from lightning_sft.training.continuing import OptimizerSettings, continue_schedule

EFFECT, NONE, REFUSED = "takes effect", "cannot matter", "is refused"


def adamw(params, **changes):
    return torch.optim.AdamW(params, **({"lr": 0.01, "weight_decay": 0.1} | changes))


def halved(log_probs):
    return -log_probs / 2


def is_even(row):
    return len(row["output"]) % 2 == 0


def reverse(row):
    return row | {"output": row["output"][::-1]}


OPTIMIZER = {
    "lr": (partial(adamw, lr=0.03), EFFECT),
    "weight_decay": (partial(adamw, weight_decay=0.9), EFFECT),
    "betas": (partial(adamw, betas=(0.5, 0.6)), EFFECT),
    "eps": (partial(adamw, eps=0.1), EFFECT),
    "maximize": (partial(adamw, maximize=True), EFFECT),
    "amsgrad": (partial(adamw, amsgrad=True), "cannot continue with `amsgrad` = True"),
    "fused": (partial(adamw, fused=True), NONE),
    "foreach": (partial(adamw, foreach=True), NONE),
}
MODULE = {
    "model": (tiny_config(attention_dropout=0.9), EFFECT),
    "loss_normalization": ("token", REFUSED),
    "normalize_constant": (2.0, REFUSED),
    "loss_type": (halved, "made with `loss_type` = nll, now it is test_changed_settings.halved"),
    "label_smoothing": (0.1, REFUSED),
    "neftune_noise_alpha": (5.0, EFFECT),
    "max_grad_norm": (0.001, EFFECT),
    "parameter_groups": ([{"pattern": "norm", "lr": 0.2}], REFUSED),
    "freeze": (["embed_tokens"], REFUSED),
    "lr_scheduler": ("constant_with_warmup", EFFECT),
    "warmup_steps": (4, EFFECT),
    "lr_scheduler_kwargs": ({"num_cycles": 2.5}, EFFECT),
    "gradient_checkpointing": (2, NONE),
    "nonfinite": ("skip", NONE),
    "sync_every_microbatch": (True, NONE),
    "lora": ({"r": 2}, REFUSED),
    "model_kwargs": ({"dtype": torch.bfloat16}, EFFECT),
    "seed": (5, NONE),  # of dropout, of which there is none here
}
DATA = {
    "tokenizer": (character_tokenizer(bos=True), "other training rows or tokens"),
    "train_data": (ROWS[::-1], "other training rows or tokens"),
    "val_data": (ROWS[5:9], NONE),
    "test_data": (ROWS[:5], NONE),
    "predict_data": (ROWS[:5], NONE),
    "val_fraction": (0.2, "`num_rows` = 22, now it is 17"),
    "prompt_field": ("output", "other training rows or tokens"),
    "output_field": ("prompt", "other training rows or tokens"),
    "train_on_prompts": (True, "other training rows or tokens"),
    "text_field": ("output", "other training rows or tokens"),
    "ground_truth_field": ("prompt", NONE),
    "prompt_template": ("Q: {prompt}", "other training rows or tokens"),
    "row_filter": (is_even, "`num_rows` = 22, now it is 13"),
    "row_transform": (reverse, "other training rows or tokens"),
    "batch_size": (4, REFUSED),
    "gradient_accumulation_steps": (2, NONE),
    "max_tokens_per_microbatch": (64, NONE),
    "layout": ("packed", NONE),
    "max_length": (12, "other training rows or tokens"),
    "too_long": ("drop", NONE),  # of which there are none
    "bad_rows": ("drop", NONE),  # likewise
    "append_eos": (False, "other training rows or tokens"),
    "seed": (1, REFUSED),
    "streaming": (True, REFUSED),
    "num_workers": (1, NONE),
    "num_proc": (1, NONE),
}
TRAINER = {
    "max_steps": (9, EFFECT),
    "limit_train_batches": (2, "3 optimizer steps in each epoch, now it is 2 (`trainer.limit_train_batches`)"),
    "overfit_batches": (1, "another `trainer.overfit_batches`"),
}
# Compiling takes a minute; settings of conversations change tokens or what is learnt of them, as those above do.
ELSEWHERE = {
    "activation_offloading",
    "num_replicas",
    "compile",
    "optimizer",
    "shuffle_buffer",  # of streams
    "as_chat",
    "chat_template",
    "chat_template_kwargs",
    "train_on_turns",
}


def test_every_setting_is_in_these_tables():
    assert (MODULE.keys() | DATA.keys()) & ELSEWHERE == set()
    given = [set(inspect.signature(kind).parameters) for kind in (SFTModule, SFTDataModule)]
    assert given[0] | given[1] == MODULE.keys() | DATA.keys() | ELSEWHERE
    assert given[0] - ELSEWHERE == MODULE.keys()


class Watch(L.Callback):
    """The learning rate of each optimizer step; ends the run after some."""

    def __init__(self, stop_after=None):
        self.rates, self.stop_after = [], stop_after

    def on_train_batch_end(self, trainer, *args):
        self.rates.append(trainer.callback_metrics["train/learning_rate"].item())
        trainer.should_stop = trainer.global_step == self.stop_after


def run(folder, ckpt_path=None, stop_after=None, max_steps=6, module=(), data=(), **trainer_options):
    """The weights that a run ends with, by name, and the learning rates of its steps; it leaves a checkpoint."""
    made = {"model": tiny_config(), "optimizer": adamw, "loss_normalization": "sequence", "warmup_steps": 1}
    sft, watch = SFTModule(**(made | dict(module))), Watch(stop_after)
    trainer = make_trainer(folder, max_epochs=-1, max_steps=max_steps, callbacks=[watch], **trainer_options)
    trainer.fit(sft, make_data(**({"val_data": ROWS[:5]} | dict(data))), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "end.ckpt", weights_only=False)
    return {name: weight.detach().float().clone() for name, weight in sft.model.named_parameters()}, watch.rates


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A checkpoint after 4 of 6 steps, and the weights that the run ends with if nothing is changed."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder / "first", stop_after=4)
    return folder / "first" / "end.ckpt", run(folder / "then", folder / "first" / "end.ckpt")[0]


def check(begun, folder, outcome, name, **changes):
    checkpoint, unchanged = begun
    if outcome not in (EFFECT, NONE):
        expected = f"`{name}`" if outcome == REFUSED else outcome
        with pytest.raises(SettingsError) as caught:
            run(folder, checkpoint, **changes)
        assert expected in str(caught.value)
        return
    weights = run(folder, checkpoint, **changes)[0]
    same = all(torch.allclose(weights[each], unchanged[each], rtol=1e-4, atol=1e-6) for each in unchanged)
    assert same == (outcome == NONE)


@pytest.mark.parametrize("name", OPTIMIZER)
def test_a_changed_optimizer(begun, tmp_path, name):
    optimizer, outcome = OPTIMIZER[name]
    check(begun, tmp_path, outcome, name, module={"optimizer": optimizer})


def test_changed_settings_are_told_beside_what_they_were(begun, tmp_path, caplog):
    run(tmp_path, begun[0])
    assert "changed settings" not in caplog.text
    changes = {"optimizer": partial(adamw, lr=0.03, eps=0.1), "warmup_steps": 4, "max_grad_norm": 0.5}
    run(tmp_path, begun[0], module=changes)
    told = next(line for line in caplog.messages if "changed settings" in line)
    assert told == (
        "The run continues with changed settings: `lr` 0.03 (before: 0.01), `eps` 0.1 (before: 1e-08), `warmup_steps` "
        "4 (before: 1), `max_grad_norm` 0.5 (before: 1.0)."
    )


@pytest.mark.parametrize("name", MODULE)
def test_a_changed_setting_of_the_module(begun, tmp_path, name):
    value, outcome = MODULE[name]
    check(begun, tmp_path, outcome, name, module={name: value})


@pytest.mark.parametrize("name", DATA)
def test_a_changed_setting_of_the_data(begun, tmp_path, name):
    value, outcome = DATA[name]
    further = {
        "max_length": {"too_long": "truncate"},
        "too_long": {"max_length": 60},
        "val_fraction": {"val_data": None},
    }
    more = further.get(name, {})
    if name == "streaming":
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "output": "b"}\n')
        more = {"train_data": str(tmp_path / "rows.jsonl")}
    check(begun, tmp_path, outcome, name, data=more | {name: value})


@pytest.mark.parametrize("name", TRAINER)
def test_a_changed_setting_of_the_run_s_length(begun, tmp_path, name):
    value, outcome = TRAINER[name]
    check(begun, tmp_path, outcome, name, **{name: value})


@pytest.mark.parametrize("changed", [{"lr": 0.2}, {"weight_decay": 0.9}])
def test_changed_settings_of_a_group_take_effect_on_it_alone(tmp_path, changed):
    def groups(**settings):
        return {"parameter_groups": [{"pattern": "norm", "lr": 0.1, "weight_decay": 0.1} | settings]}

    run(tmp_path / "first", stop_after=5, module=groups())
    checkpoint = tmp_path / "first" / "end.ckpt"
    weights = [run(tmp_path / f"{i}", checkpoint, module=groups(**each))[0] for i, each in enumerate(({}, changed))]
    other = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert other == {name for name in weights[0] if "norm" in name}


def test_a_rate_that_cannot_be_changed_is_named_in_whatever_group_it_is():
    def made(lr):
        first, second = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": lr}])

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(made(0.2), 8)
    with pytest.raises(SettingsError, match=r"`lr` = 0\.2, now it is 0\.3, .* Use 0\.2, or"):
        continue_schedule(scheduler, *(OptimizerSettings.of(made(lr)) for lr in (0.2, 0.3)))


def shares(num_steps, num_warmup_steps=1):
    """A cosine's share of the learning rate in each step."""
    later = range(num_steps - num_warmup_steps)
    warmup = [step / num_warmup_steps for step in range(num_warmup_steps)]
    return warmup + [(1 + math.cos(math.pi * step / (num_steps - num_warmup_steps))) / 2 for step in later]


@pytest.mark.parametrize("lr", [0.01, 0.002])
def test_a_finished_run_goes_on_by_the_schedule_of_the_longer_run(tmp_path, lr):
    first = run(tmp_path, max_steps=4)[1]
    assert first == pytest.approx([0.01 * share for share in shares(4)])
    then = run(tmp_path, tmp_path / "end.ckpt", max_steps=10, module={"optimizer": partial(adamw, lr=lr)})[1]
    assert then == pytest.approx([lr * share for share in shares(10)[4:]])


@pytest.mark.parametrize("lr", [0.01, 0.03])
@pytest.mark.parametrize("kind", ["StepLR", "ExponentialLR", "PolynomialLR", "CosineAnnealingLR"])
def test_a_schedule_that_makes_each_rate_of_the_one_before_goes_on_in_proportion_or_is_refused(tmp_path, kind, lr):
    arguments = {"StepLR": (2, 0.5), "ExponentialLR": (0.5,), "PolynomialLR": (8,), "CosineAnnealingLR": (8, 0.001)}

    class Stepwise(SFTModule):
        def configure_optimizers(self):
            optimizer = self.optimizer_factory(self.parameters())
            scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, *arguments[kind])
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def rates(name, lr, max_steps, ckpt_path=None):
        watch = Watch()
        trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=max_steps, callbacks=[watch])
        module = Stepwise(tiny_config(), optimizer=partial(adamw, lr=lr))
        trainer.fit(module, make_data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / name, weights_only=False)
        return watch.rates

    rates("end.ckpt", 0.01, 3)
    if kind == "CosineAnnealingLR" and lr != 0.01:  # whose lowest rate stays as it is
        with pytest.raises(
            SettingsError, match=rf"`lr` = 0\.01, now it is 0\.03, but {kind} computes each learning rate"
        ):
            rates("other.ckpt", lr, 6, tmp_path / "end.ckpt")
        return
    assert rates("other.ckpt", lr, 6, tmp_path / "end.ckpt") == pytest.approx(rates("whole.ckpt", lr, 6)[3:])
