"""A subclass of `SFTModule` as anybody would write one: optimizers, schedules, parameter groups, frozen layers."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from support.fits import ROWS, fit, make_data, make_trainer
from support.models import character_tokenizer, save_tiny_model, tiny_config
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_sft import SFTDataModule, SFTModule, StepProgressBar, get_response_log_probs
from lightning_sft.errors import SettingsError

VALIDATED = {"val_data": ROWS[:5]}


class Rates(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_end(self, trainer, *args):
        self.rates.append(trainer.callback_metrics["train/learning_rate"].item())


def rates_of(folder, configure, **options):
    kind = type("Subclass", (SFTModule,), {"configure_optimizers": configure})
    rates = Rates()
    module = kind(tiny_config())
    fit(folder, module, make_data(**VALIDATED), callbacks=[rates], **options)
    return module, rates.rates


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **({"lr": 0.8} | options))


def test_an_optimizer_alone_keeps_its_rate(tmp_path):
    assert rates_of(tmp_path, sgd)[1] == [0.8] * 6


def test_a_rate_in_a_tensor_which_a_schedule_overwrites_is_logged_as_it_was_in_the_step(tmp_path):
    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.75))
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}]

    assert rates_of(tmp_path, configure, max_steps=3)[1] == [0.75, 0.375, 0.1875]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (lambda each: each, [0.8] * 3 + [0.4] * 3),  # once an epoch, as Lightning has it unless told otherwise
        (lambda each: {"scheduler": each}, [0.8] * 3 + [0.4] * 3),
        (lambda each: {"scheduler": each, "interval": "step"}, [0.8, 0.4, 0.2, 0.1, 0.05, 0.025]),
        (lambda each: {"scheduler": each, "interval": "step", "frequency": 2}, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]),
    ],
)
@pytest.mark.parametrize("form", ["dictionary", "lists"])
def test_a_schedule_is_stepped_as_it_says(tmp_path, schedule, expected, form):
    def configure(module):
        optimizer = sgd(module)
        scheduler = schedule(StepLR(optimizer, 1, 0.5))
        lists = [optimizer], [scheduler]
        return lists if form == "lists" else {"optimizer": optimizer, "lr_scheduler": scheduler}

    rates = rates_of(tmp_path, configure)[1]
    assert rates == pytest.approx(expected)


METRIC = "val/token_entropy"


@pytest.mark.parametrize(
    "form",
    [
        lambda optimizer, plateau: {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": METRIC},
        lambda optimizer, plateau: [
            {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": METRIC}}
        ],
        lambda optimizer, plateau: ([optimizer], [StepLR(optimizer, 99), {"scheduler": plateau, "monitor": METRIC}]),
    ],
    ids=["dictionary", "list of dictionaries", "second of two"],
)
def test_a_schedule_follows_a_metric(tmp_path, form):
    """The threshold is so large that no validation is better than the first; the rate falls after each later one."""
    followed = []

    class Own(SFTModule):
        def configure_optimizers(self):
            optimizer = sgd(self)
            plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")
            return form(optimizer, plateau)

        def lr_scheduler_step(self, scheduler, metric):
            followed.extend([] if metric is None else [metric])
            super().lr_scheduler_step(scheduler, metric)

    rates = Rates()
    trainer = fit(tmp_path, Own(tiny_config()), make_data(**VALIDATED), callbacks=[rates], val_check_interval=2)[2]
    assert rates.rates == pytest.approx([0.8, 0.8, 0.8, 0.8, 0.4, 0.4])
    assert len(followed) == 3
    assert followed[-1] == trainer.callback_metrics[METRIC]


def test_a_metric_that_is_not_there_is_named(tmp_path):
    def configure(module):
        optimizer = sgd(module)
        return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer), "monitor": "val/los"}

    with pytest.raises(SettingsError, match="ReduceLROnPlateau follows 'val/los', but the metrics are"):
        rates_of(tmp_path, configure)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("optimizer_step", r"`Own.optimizer_step` would never be called.* Do that in `training_step`, before or after"),
        ("optimizer_zero_grad", "`Own.optimizer_zero_grad` would never be called.* Leave it out"),
        (
            "configure_gradient_clipping",
            "`Own.configure_gradient_clipping` would never be called.* Set `max_grad_norm`",
        ),
        ("on_before_optimizer_step", r"does not call `super\(\).on_before_optimizer_step`"),
        ("on_train_start", r"`Own.on_train_start` does not call `super\(\).on_train_start`, in which .* Call it"),
        ("configure_callbacks", r"`Own.configure_callbacks` does not call `super\(\).configure_callbacks`"),
    ],
)
def test_a_hook_in_which_something_would_be_left_out_is_refused(tmp_path, hook, message):
    own = type("Own", (SFTModule,), {hook: lambda self, *args, **kwargs: []})
    with pytest.raises(SettingsError, match=message):
        fit(tmp_path, own(tiny_config()), max_steps=2)


@pytest.mark.parametrize(("hook", "way_out"), [("setup", "Call it"), ("train_dataloader", "give .* the loader alone")])
def test_a_hook_of_the_data_in_which_something_would_be_left_out_is_refused(tmp_path, hook, way_out):
    own = type("Own", (SFTDataModule,), {hook: lambda self, *args: None})
    with pytest.raises(SettingsError, match=f"`Own.{hook}` does not call .* in which `SFTDataModule` has .*{way_out}"):
        fit(tmp_path, data=own(character_tokenizer(), ROWS, batch_size=8), max_steps=2)


def test_validation_rows_may_come_from_a_hook_of_a_subclass_alone(tmp_path):
    class Own(SFTDataModule):
        def val_dataloader(self):
            return self.test_dataloader()

    recorder = fit(tmp_path, data=Own(character_tokenizer(), ROWS, test_data=ROWS[:5], batch_size=8), max_steps=3)[1]
    assert recorder.validated == [3]


def test_hooks_around_an_optimizer_step_are_called_once_in_each(tmp_path):
    events = []

    class Own(SFTModule):
        def on_before_zero_grad(self, optimizer):
            events.append(("zero", self.global_step, all(each.grad is not None for each in self.parameters())))

        def lr_scheduler_step(self, scheduler, metric):
            events.append(("schedule", self.global_step, metric))
            super().lr_scheduler_step(scheduler, metric)

        def configure_optimizers(self):
            optimizer = sgd(self)
            plateau = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val/loss"}
            return [optimizer], [{"scheduler": StepLR(optimizer, 1), "interval": "step"}, plateau]

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            events.append(("callback", type(optimizer), trainer.global_step))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.equal(outputs["loss"].float(), trainer.callback_metrics["train/loss"])

    data = make_data(gradient_accumulation_steps=2, **VALIDATED)
    trainer = fit(tmp_path, Own(tiny_config()), data, [Watch()], max_steps=2, val_check_interval=2)[2]
    first, second = (
        [("callback", torch.optim.SGD, i), ("zero", i, i > 0), ("schedule", i + 1, None)] for i in range(2)
    )
    assert events == [*first, *second, ("schedule", 2, trainer.callback_metrics["val/loss"])]


def test_parameter_groups_have_rates_of_their_own(tmp_path):
    def configure(module):
        first, *others = module.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": others, "lr": 0.5}])

    torch.manual_seed(0)
    before = [weight.detach().clone() for weight in started(tmp_path).parameters()]
    module, _ = rates_of(tmp_path, configure)
    after = list(module.parameters())
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[-1], before[-1])


def started(folder):
    module = SFTModule(tiny_config())
    module.configure_model()
    return module


def test_a_callback_freezes_layers_of_a_model_that_is_given_by_name(tmp_path):
    class Freeze(L.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.configure_model()  # which is called again later, and then finds the model
            pl_module.model.get_input_embeddings().requires_grad_(False)

    save_tiny_model(tmp_path / "model")
    module = SFTModule(str(tmp_path / "model"), optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[Freeze()])
    loaded = SFTModule(str(tmp_path / "model"))
    loaded.configure_model()
    trainer.fit(module, make_data())
    frozen, trained = (m.get_input_embeddings().weight for m in (loaded.model, module.model))
    assert torch.equal(frozen, trained)
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(list(module.parameters())) - 1
    assert not torch.equal(loaded.model.lm_head.weight, module.model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer")  # by Lightning, before it is refused
@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (lambda module: [sgd(module), sgd(module)], "returns 2 optimizers, but only one is supported"),
        (lambda module: None, "returns no optimizer, so nothing would be trained"),
    ],
)
def test_several_optimizers_or_none_are_refused_before_the_first_step(tmp_path, configure, message):
    with pytest.raises(SettingsError, match=f"`configure_optimizers` {message}"):
        rates_of(tmp_path, configure)


def test_an_optimizer_of_some_parameters_trains_and_clips_these_alone(tmp_path):
    def configure(module):
        return torch.optim.SGD(module.model.lm_head.parameters(), lr=0.5)

    def frozen(module):
        module.model.base_model.requires_grad_(False)
        return configure(module)

    some, alone = (rates_of(tmp_path / str(i), each, max_steps=4)[0] for i, each in enumerate((configure, frozen)))
    for name, weight in alone.named_parameters():
        assert torch.equal(weight, dict(some.named_parameters())[name]), name
    assert not torch.equal(alone.model.lm_head.weight, started(tmp_path).model.lm_head.weight)


@pytest.mark.parametrize("bar", [StepProgressBar, TQDMProgressBar])
def test_a_metric_called_loss_is_the_subclass_s_own(bar, tmp_path):
    class Own(SFTModule):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("loss", torch.tensor(float(self.global_step)), prog_bar=True)

    class Watch(L.Callback):
        shown = None

        def on_train_end(self, trainer, pl_module):
            self.shown = trainer.progress_bar_callback.get_metrics(trainer, pl_module)["loss"]

    watch = Watch()
    fit(
        tmp_path,
        Own(tiny_config(), lr_scheduler="constant"),
        make_data(),
        callbacks=[watch, bar()],
        enable_progress_bar=True,
    )
    assert watch.shown == 6


def test_what_a_subclass_clears_away_at_the_end_is_cleared_away_there_alone(tmp_path):
    torn_down = []

    class Own(SFTDataModule):
        def teardown(self, stage):
            torn_down.append(self.trainer.global_step)
            super().teardown(stage)

    fit(tmp_path, data=Own(character_tokenizer(), ROWS, batch_size=8), max_steps=2)
    assert torn_down == [2]


class WrittenAnew(SFTModule):
    def training_step(self, batch, batch_idx):
        (microbatch,) = batch.microbatches
        tokens, inputs = (microbatch.input_ids, microbatch.labels), microbatch.model_inputs()
        log_probs = get_response_log_probs(self.model, *tokens, **inputs)["log_probs"]
        loss = -log_probs[microbatch.response_mask].sum() / batch.totals.num_response_tokens
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None


@pytest.mark.parametrize(("automatic", "layout"), [(False, "packed"), (True, "padded")])
def test_a_training_step_written_anew_gets_clipping_schedule_and_guard(tmp_path, automatic, layout):
    class Watch(Rates):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer)
            self.rates += [*pl_module.lr_schedulers().get_last_lr(), trainer.callback_metrics["train/grad_norm"].item()]

    def run(kind, **changes):
        module, watch = kind(tiny_config(), max_grad_norm=0.5, warmup_steps=2), Watch()
        module.automatic_optimization = automatic and kind is WrittenAnew
        data = make_data(layout=layout, **changes)
        make_trainer(tmp_path, max_steps=4, callbacks=[watch]).fit(module, data)
        return module, watch.rates

    (given, expected), (own, rates) = run(SFTModule), run(WrittenAnew)
    assert expected[::3] == pytest.approx([0, 0.5e-5, 1e-5, 0.5e-5])
    assert rates == pytest.approx(expected, rel=1e-4)
    for name, weight in given.model.named_parameters():
        torch.testing.assert_close(own.model.get_parameter(name), weight)

    class NoNumber(WrittenAnew):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.model.get_input_embeddings().weight.data.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match=r"Optimizer step 2 has the gradient norm nan\. No checkpoint holds"):
        run(NoNumber)


def test_a_training_step_that_steps_schedules_itself_is_refused(tmp_path):
    class Own(WrittenAnew):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.lr_schedulers().step()

    class Reading(SFTModule):
        def training_step(self, batch, batch_idx):
            self.optimizers().step()
            self.log("rate", self.lr_schedulers().get_last_lr()[0])

    make_trainer(tmp_path, max_steps=2).fit(Reading(tiny_config()), make_data())
    with pytest.raises(SettingsError, match=r"^LambdaLR was stepped by your own code, but .* Leave that out"):
        make_trainer(tmp_path, max_steps=2).fit(Own(tiny_config()), make_data())


def test_a_subclass_may_have_settings_and_hyperparameters_of_its_own(tmp_path):
    class OwnModule(SFTModule):
        def __init__(self, class_weights):
            super().__init__(tiny_config())
            self.save_hyperparameters()
            self.settings = None

    class OwnData(SFTDataModule):
        def __init__(self, num_rows):
            super().__init__(character_tokenizer(), ROWS[:num_rows], batch_size=8)
            self.save_hyperparameters()

    trainer = make_trainer(tmp_path, max_steps=1, logger=CSVLogger(tmp_path))
    trainer.fit(OwnModule(torch.ones(2)), OwnData(9))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert OwnData.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True).hparams.num_rows == 9
