"""Settings of the training that cannot be used, and data that does not fit the model."""

import math

import torch
from support.fits import make_data, make_trainer
from support.models import tiny_config
from support.refusals import Refusal, each, fit, module
from transformers import Adafactor

from lightning_sft import SFTModule
from lightning_sft.errors import SettingsTypeError


def fit_plain_batches(folder):
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 2
    make_trainer(folder, max_epochs=1).fit(SFTModule(tiny_config()), torch.utils.data.DataLoader(rows), rows)


class Automatic(SFTModule):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = True


class WithOtherWeights(torch.optim.SGD):
    """As a schedule-free optimizer."""

    def eval(self):
        """Put the averages in the place of the weights."""


TRAINING = {
    "model of a number": Refusal(
        module(5), "`model` is 5 of type int, expected a name, a path, settings or a model.", SettingsTypeError
    ),
    "unknown loss": Refusal(
        module({}, loss_normalization="tokens"), "`loss_normalization` is 'tokens', expected one of token, sequence."
    ),
    "constant of zero": Refusal(
        module({}, normalize_constant=math.inf), "`normalize_constant` is inf, expected a positive number."
    ),
    "constant of nothing": Refusal(
        module({}, normalize_constant=7.0),
        "`normalize_constant` is 7.0, but `loss_normalization` is 'token', which divides by the number of response "
        "tokens alone. Leave it out, or set `loss_normalization` to 'sequence'.",
    ),
    "compile of text": Refusal(
        module({}, compile="no"), "`compile` is 'no' of type str, expected true or false.", SettingsTypeError
    ),
    "sync_every_microbatch of a number": Refusal(
        module({}, sync_every_microbatch=2),
        "`sync_every_microbatch` is 2 of type int, expected true, false or none.",
        SettingsTypeError,
    ),
    "conversion of a model that is not loaded yet": Refusal(
        lambda folder: SFTModule(tiny_config()).half(),
        "`SFTModule` has no model yet whose weights could be converted. Set their type by `model_kwargs`, such as "
        "{'dtype': 'bfloat16'}, or the trainer's `precision`.",
    ),
    "unknown word for steps that are not finite": Refusal(
        module({}, nonfinite="ignore"), "`nonfinite` is 'ignore', expected one of error, skip."
    ),
    "negative max_grad_norm": Refusal(
        module({}, max_grad_norm=-1.0), "`max_grad_norm` is -1.0, expected a positive number or none."
    ),
    "negative seed": Refusal(module({}, seed=-1), "`seed` is -1, expected at least 0."),
    "negative warmup_steps": Refusal(
        module({}, warmup_steps=-1), "`warmup_steps` is -1, expected a number of steps or a fraction below 1."
    ),
    "max_grad_norm of NaN": Refusal(
        module({}, max_grad_norm=math.nan), "`max_grad_norm` is nan, expected a positive number or none."
    ),
    "max_grad_norm of text": Refusal(
        module({}, max_grad_norm="1"),
        "`max_grad_norm` is '1' of type str, expected a positive number or none.",
        SettingsTypeError,
    ),
    "warmup_steps of two and a half": Refusal(
        module({}, warmup_steps=2.5), "`warmup_steps` is 2.5, expected a number of steps or a fraction below 1."
    ),
    "model_kwargs of a list": Refusal(
        module({}, model_kwargs=[1]),
        "`model_kwargs` is [1] of type list, expected a mapping of arguments.",
        SettingsTypeError,
    ),
    "optimizer by name in Python": Refusal(
        module({}, optimizer="AdamW"),
        "`optimizer` is 'AdamW', expected a function of the parameters.",
        SettingsTypeError,
    ),
    "optimizer that needs a closure": Refusal(
        fit(tiny_config(), optimizer=torch.optim.LBFGS),
        "`optimizer` is LBFGS, which computes loss and gradients several times a step. Here they are computed "
        "once, before the optimizer's step. Choose another, such as AdamW.",
    ),
    "optimizer with weights for training alone": Refusal(
        fit(tiny_config(), optimizer=WithOtherWeights),
        "`optimizer` is WithOtherWeights, which trains other weights than are to be evaluated and saved (it has "
        "`eval`). Validation, generations, checkpoints and exports would have the wrong ones. ...",
    ),
    "optimizer without a rate": Refusal(
        fit(tiny_config(), optimizer=Adafactor),
        "`optimizer` is Adafactor without a learning rate, which `lr_scheduler` is to multiply. Give it an `lr`; ...",
    ),
    "optimizer of matrices alone": Refusal(
        fit(tiny_config(), optimizer=torch.optim.Muon),
        "`optimizer` cannot be made of the model's parameters: Muon only supports 2D parameters ... Choose another, "
        "such as AdamW, or `freeze` those that it cannot train.",
    ),
    "unknown schedule": Refusal(
        module({}, lr_scheduler="cosin"), "`lr_scheduler` is 'cosin', expected one of constant, ...cosine, ..."
    ),
    "schedule of a metric": Refusal(
        module({}, lr_scheduler="reduce_lr_on_plateau"),
        "`lr_scheduler` is 'reduce_lr_on_plateau', which follows a metric, not the optimizer steps. Choose another, "
        "such as cosine.",
    ),
    "another schedule of a metric": Refusal(
        module({}, lr_scheduler="greedy"),
        "`lr_scheduler` is 'greedy', which follows a metric, not the optimizer steps. Choose another, such as cosine.",
    ),
    "unknown argument of the schedule": Refusal(
        module({}, lr_scheduler_kwargs={"cycles": 2}),
        "`lr_scheduler` is 'cosine' with `lr_scheduler_kwargs` = {'cycles': 2}: ... got an unexpected keyword argument "
        "'cycles'",
    ),
    "schedule over an endless run": Refusal(
        fit(tiny_config(), trainer={"max_steps": -1, "max_epochs": -1}),
        "`lr_scheduler` is 'cosine' with `warmup_steps` = 0.03, but the run has no length. Set `max_steps` or "
        "`max_epochs`, or choose `constant` or `constant_with_warmup` with a number of steps.",
    ),
    "validation by the clock": Refusal(
        fit(tiny_config(), trainer={"val_check_interval": "00:00:01:30"}),
        "`trainer.val_check_interval` is a time, 90 seconds, but validations are counted in optimizer steps: each "
        "device has a clock of its own, and a run that continues would validate at other steps. Give a number of "
        "steps, or a fraction of an epoch.",
    ),
    "interval of steps in each other epoch": Refusal(
        fit(tiny_config(), trainer={"val_check_interval": 2, "check_val_every_n_epoch": 2}),
        "`trainer.val_check_interval` is 2 and `trainer.check_val_every_n_epoch` is 2, but an interval counts "
        "optimizer steps over the whole run, whatever the epoch. Give one of them.",
    ),
    "batches of another loader": Refusal(
        fit_plain_batches,
        "The loader gives a batch of type dict, but `SFTModule` takes the `OptimizerStep`s of `SFTDataModule`, which "
        "also takes rows with `input_ids` and `labels`: `trainer.fit(module, SFTDataModule(tokenizer, rows))`.",
        SettingsTypeError,
    ),
    "accumulation by Lightning": Refusal(
        fit(tiny_config(), trainer={"accumulate_grad_batches": 4}),
        "`trainer.accumulate_grad_batches` is 4, but a batch is a whole optimizer step. Use "
        "`gradient_accumulation_steps` or `max_tokens_per_microbatch` of `SFTDataModule`, which split an optimizer "
        "step without changing its result.",
    ),
    "accumulation by Lightning, which takes the steps": Refusal(
        lambda folder: make_trainer(folder, max_epochs=1, accumulate_grad_batches=2).fit(
            Automatic(tiny_config()), make_data()
        ),
        "`trainer.accumulate_grad_batches` is 2, but a batch is a whole optimizer step. Use "
        "`gradient_accumulation_steps` or `max_tokens_per_microbatch` of `SFTDataModule`, which split an optimizer "
        "step without changing its result.",
    ),
    "clipping by Lightning": Refusal(
        fit(tiny_config(), trainer={"gradient_clip_val": 0.5}),
        "`trainer.gradient_clip_val` is 0.5, but `SFTModule` clips gradients itself, by their total norm over all "
        "devices. Use its `max_grad_norm`.",
    ),
    "clipping of a kind alone": Refusal(
        fit(tiny_config(), trainer={"gradient_clip_algorithm": "value"}),
        "`trainer.gradient_clip_algorithm` is value, but `SFTModule` clips gradients itself, by their total norm over "
        "all devices. Use its `max_grad_norm`.",
    ),
    "module compiled as a whole": Refusal(
        lambda folder: make_trainer(folder, max_epochs=1).fit(torch.compile(SFTModule(tiny_config())), make_data()),
        "The module was compiled as a whole (`torch.compile(module)`), with all that an optimizer step does besides "
        "running the model. Give it `compile=True` instead, which compiles the model's blocks.",
    ),
    "tokenizer of another model": Refusal(
        fit(tiny_config(vocab_size=100)),
        "The tokenizer has 131 tokens, but the model only 100 embeddings. Use the model's own tokenizer, or call "
        "`model.resize_token_embeddings` first.",
    ),
    "row longer than the model": Refusal(
        fit(tiny_config(max_position_embeddings=4)),
        "row 1 of `train_data`: The row has 6 tokens, but the model has only 4 positions. Set `max_length` to 5 at "
        "most, and `too_long` to drop or truncate.",
    ),
}


@each(TRAINING)
def test_a_setting_that_cannot_be_used_is_refused_by_name(refusal, tmp_path):
    refusal.check(tmp_path)
