"""Lightning's own callbacks under manual optimization: they count optimizer steps."""

import csv
import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from support.runs import ROWS, longer_length, read_log, train

from lightning_sft import GenerationMonitor, HuggingFaceExport, Sampling

DATA = {"val_data": ROWS[:5], "gradient_accumulation_steps": 2}
CONSTANT = {"lr_scheduler": "constant", "warmup_steps": 0}


def test_early_stopping_ends_the_run_at_the_step_expected(tmp_path):
    stopping = EarlyStopping("val/loss", patience=2, min_delta=100.0)  # the first is the best; then nothing is better
    result = train(tmp_path, data=DATA, callbacks=[stopping], val_check_interval=2)
    assert len(result["losses"]) == 6
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6


# Lightning would have weights from before the step; ours are those of the step that the file is named by.
def test_model_checkpoint_counts_optimizer_steps_and_keeps_the_best(tmp_path):
    every_third = ModelCheckpoint(tmp_path / "third", "{step}", every_n_train_steps=3, save_top_k=-1)
    best = ModelCheckpoint(tmp_path / "best", "{step}", monitor="val/loss", save_top_k=2, mode="max")
    train(tmp_path, data=DATA, callbacks=[every_third, best], max_steps=8, val_check_interval=2)
    steps = {name: sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("third", "best")}
    assert steps["third"] == ["step=3.ckpt", "step=6.ckpt"]
    losses = {line["step"]: line["val/loss"] for line in read_log(tmp_path / "validations_0.jsonl")}
    assert len(losses) == 4
    assert steps["best"] == sorted(f"step={step}.ckpt" for step in sorted(losses, key=losses.__getitem__)[-2:])
    for path in (*(tmp_path / "third").iterdir(), *(tmp_path / "best").iterdir()):
        assert torch.load(path)["global_step"] == int(path.stem.removeprefix("step="))


def test_learning_rate_monitor_logs_the_rate_of_each_optimizer_step(tmp_path):
    logger = CSVLogger(tmp_path, name="")
    train(tmp_path, data=DATA, callbacks=[LearningRateMonitor()], max_steps=8, logger=logger, log_every_n_steps=1)
    with open(tmp_path / "version_0" / "metrics.csv") as file:
        rates = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row["lr-AdamW"]]
    shares = [0, 1 / 2] + [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]  # two steps of warm-up
    assert rates == pytest.approx([0.01 * share for share in shares])


# -- averages of weights ----------------------------------------------------------------------------------------------


class Spy(L.Callback):
    """The weights after each optimizer step, and those that each validation evaluates."""

    def __init__(self):
        self.trained, self.evaluated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.trained.append(weights_of(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.evaluated.append(weights_of(pl_module))


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.model.named_parameters()}


def averaging():
    return EMAWeightAveraging(decay=0.75, use_buffers=False)


configure_model_warning = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")


@configure_model_warning
def test_an_average_of_weights_is_updated_evaluated_saved_and_exported(tmp_path):
    spy = Spy()
    callbacks = [spy, HuggingFaceExport(), averaging()]
    result = train(tmp_path, data=DATA, module=CONSTANT, callbacks=callbacks, max_steps=5, val_check_interval=2)
    average, averages = spy.trained[0], [spy.trained[0]]
    for weights in spy.trained[1:]:
        average = {name: 0.75 * average[name] + 0.25 * weights[name] for name in weights}
        averages.append(average)
    assert not torch.equal(averages[-1]["lm_head.weight"], spy.trained[-1]["lm_head.weight"])
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt")
    exported = load_file(tmp_path / "huggingface" / "model.safetensors")
    for name, expected in averages[-1].items():
        for found in (result["weights"][name], exported[name], checkpoint["state_dict"][f"model.{name}"]):
            torch.testing.assert_close(found, expected)
        for evaluated, then in zip(spy.evaluated, (averages[1], averages[3]), strict=True):
            torch.testing.assert_close(evaluated[name], then[name])
        assert torch.equal(checkpoint["current_model_state"][f"model.{name}"], spy.trained[-1][name])


@configure_model_warning
def test_generations_at_a_validation_are_of_the_average_that_it_evaluates(tmp_path):
    """Also where they would be due at this step by themselves, before the average takes the place of the weights."""
    for every_n_steps in (None, 2):
        monitor = GenerationMonitor(longer_length, 2, every_n_steps, Sampling(max_new_tokens=2))
        options = {"callbacks": [monitor, averaging()], "max_steps": 2, "val_check_interval": 2}
        train(tmp_path / str(every_n_steps), data=DATA, module=CONSTANT, **options)
    alone, both = (tmp_path / name / "generations" / "step_2.jsonl" for name in ("None", "2"))
    assert both.read_text() == alone.read_text()


@configure_model_warning
def test_a_run_with_an_average_goes_on_to_the_last_bit(tmp_path):
    options = {"data": DATA, "module": CONSTANT, "val_check_interval": 2}
    straight = train(tmp_path / "straight", callbacks=[averaging()], max_steps=6, **options)
    for max_steps in (3, 6):  # the first part ends without a validation
        continued = train(tmp_path / "continued", callbacks=[averaging()], max_steps=max_steps, **options)
    assert continued["losses"] == straight["losses"]
    for name, weight in straight["weights"].items():
        assert torch.equal(continued["weights"][name], weight), name
    logs = [read_log(tmp_path / name / "validations_0.jsonl") for name in ("straight", "continued")]
    assert json.dumps(logs[0]) == json.dumps(logs[1])
