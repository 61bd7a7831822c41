"""A second `fit` of the same trainer goes on as from a checkpoint: after an interruption, or for more epochs."""

import re
from functools import partial

import lightning as L
import pytest
import torch
from support.fits import ROWS, make_data, make_trainer
from support.models import character_tokenizer, tiny_config

from lightning_sft import GenerationMonitor, Sampling, SFTDataModule, SFTModule
from lightning_sft.errors import SettingsError

adamw = partial(torch.optim.AdamW, lr=0.01)


class Rates(L.Callback):
    """The learning rate of each step; the run is interrupted once, in the hook after step `stop`."""

    def __init__(self, stop=None):
        self.rates, self.stop = [], stop

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.rates.append(trainer.callback_metrics["train/learning_rate"].item())
        if trainer.global_step == self.stop:
            self.stop = None
            raise InterruptedError


def begin(folder, max_epochs, stop=None, **module):
    rates = Rates(stop)
    options = {"optimizer": adamw, "lr_scheduler": "linear", "warmup_steps": 2} | module
    module = SFTModule(tiny_config(attention_dropout=0.2), **options)
    return make_trainer(folder, max_epochs=max_epochs, callbacks=[rates]), module, rates.rates


def is_same(one, other):
    return all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())


@pytest.mark.parametrize("stop", [2, 3, 4])  # within an epoch of three steps, and at its end
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(tmp_path, stop):
    data = make_data(val_data=ROWS[:5])
    trainer, straight, expected = begin(tmp_path, 3)
    trainer.fit(straight, data)
    trainer, module, rates = begin(tmp_path, 3, stop)
    with pytest.raises(InterruptedError):
        trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    assert rates == expected
    assert is_same(module, straight)


def test_more_epochs_are_those_of_a_run_that_continues_from_its_checkpoint(tmp_path):
    trainer, module, rates = begin(tmp_path, 1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_data())

    trainer, continued, expected = begin(tmp_path, 2)
    trainer.fit(continued, make_data(), ckpt_path=tmp_path / "first.ckpt")
    assert rates == [0.0, 0.005, 0.01, *expected]
    assert expected == pytest.approx([0.0075, 0.005, 0.0025])
    assert is_same(module, continued)


def test_other_data_is_refused_where_the_run_would_go_on_at_some_place_in_it(tmp_path):
    trainer, module, _ = begin(tmp_path, 1)
    trainer.fit(module, make_data())
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(
        SettingsError, match=r"taken 3 optimizer steps already.*: that run .* `num_rows` = 22, now it is 9"
    ):
        trainer.fit(module, make_data(train_data=ROWS[:9]))


def test_another_module_is_refused_of_whose_run_only_the_rest_would_be_left(tmp_path, monkeypatch):
    data = make_data()
    trainer, module, _ = begin(tmp_path, 2, stop=1)
    with pytest.raises(InterruptedError):
        trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = begin(tmp_path, 2)[1]
    with pytest.raises(
        SettingsError, match=r"1 optimizer step already, with another module, .* Fit with a new trainer"
    ):
        trainer.fit(other, data)
    # As that of a sharded model, which Lightning restores after `on_fit_start`.
    monkeypatch.setattr(type(trainer.strategy), "restore_checkpoint_after_setup", True)
    trainer.fit(other, data, ckpt_path=tmp_path / "one.ckpt")
    assert trainer.global_step == 6


@pytest.mark.parametrize(
    ("make", "name", "value", "given"),
    [
        (make_data, "batch_size", 4, 8),
        (lambda: SFTModule(tiny_config()), "max_grad_norm", 0.5, 1.0),
        (GenerationMonitor, "sampling", Sampling(temperature=1.0), "Sampling"),
    ],
)
def test_a_setting_of_what_is_made_is_not_changed_in_silence(make, name, value, given):
    made = make()
    with pytest.raises(SettingsError, match=f"`{name}` is set to {re.escape(str(value))[:7]}.* was made with {given}"):
        setattr(made, name, value)
    own = object.__new__(type("Own", (type(made),), {}))
    vars(own).update(vars(made))
    setattr(own, name, value)  # who writes a subclass gives its attributes a meaning


def test_no_datamodule_is_made_of_a_checkpoint_which_does_not_hold_its_settings(tmp_path):
    trainer, module, _ = begin(tmp_path, 1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(SettingsError, match=r"no settings of the data. Make a `SFTDataModule` with its arguments"):
        SFTDataModule.load_from_checkpoint(tmp_path / "one.ckpt", tokenizer=character_tokenizer(), train_data=ROWS)


def test_hyperparameters_that_were_changed_are_refused_before_a_fit(tmp_path):
    trainer, module, _ = begin(tmp_path, 1)
    module.hparams.warmup_steps = 3
    with pytest.raises(SettingsError, match=r"`hparams.warmup_steps` is set to 3, but the `SFTModule` was made with 2"):
        trainer.fit(module, make_data())


def test_an_optimizer_of_other_parameters_begins_anew_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer, module, rates = begin(tmp_path, 1, lr_scheduler="constant", warmup_steps=0)
    module.configure_model()
    module.model.lm_head.requires_grad_(False)
    trainer.fit(module, make_data())
    assert "begin anew" not in caplog.text
    module.model.lm_head.requires_grad_(True)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_data())
    assert "continues after an earlier `fit`, but with another optimizer, other parameters" in caplog.text
    assert trainer.optimizers[0].state[module.model.lm_head.weight]["step"] == 3
    assert rates == [0.01] * 6


def test_an_optimizer_with_a_state_dict_of_its_own_continues_with_frozen_weights(tmp_path):
    class Wrapper(torch.optim.SGD):
        def state_dict(self):
            return {"wrapped": (state := super().state_dict()), "param_groups": state["param_groups"]}

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict["wrapped"])

    options = {"optimizer": partial(Wrapper, lr=0.01, momentum=0.9), "freeze": ["embed_tokens"]}
    trainer, module, _ = begin(tmp_path, 1, **options)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer, module, rates = begin(tmp_path, 2, **options)
    trainer.fit(module, make_data(), ckpt_path=tmp_path / "one.ckpt")
    assert len(rates) == 3


def test_a_checkpoint_with_states_of_other_parameters_is_refused_also_where_they_have_the_same_shapes(tmp_path):
    def begin_without(layer, max_epochs):
        trainer, module, _ = begin(tmp_path, max_epochs)
        module.configure_model()
        module.model.get_submodule(layer).requires_grad_(False)
        return trainer, module

    trainer, module = begin_without("model.layers.0.self_attn.q_proj", 1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    message = r"trained other parameters: `model.layers.0.self_attn.k_proj.weight` is trained only there, and 1 more"
    trainer, module = begin_without("model.layers.0.self_attn.k_proj", 2)
    with pytest.raises(SettingsError, match=message):
        trainer.fit(module, make_data(), ckpt_path=tmp_path / "one.ckpt")
    trainer, module = begin_without("model.layers.0.self_attn.q_proj", 2)
    trainer.fit(module, make_data(), ckpt_path=tmp_path / "one.ckpt")
