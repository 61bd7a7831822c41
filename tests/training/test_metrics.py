"""Metrics of a validation, against sums over one row at a time."""

import math

import lightning as L
import pytest
import torch
from support.fits import ROWS, fit, make_data, make_trainer, sgd
from support.models import tiny_config, tiny_model
from torch.utils.data import DataLoader

from lightning_sft import SFTModule


@pytest.mark.parametrize(("normalization", "constant"), [("token", 1.0), ("sequence", 5.0)])
def test_validation_divides_by_what_training_divides_by(tmp_path, normalization, constant):
    """The loss of a run of no learning rate, on the same rows, is that of its validation."""
    module = SFTModule(
        tiny_config(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        loss_normalization=normalization,
        normalize_constant=constant,
    )
    data = make_data(val_data=ROWS, batch_size=len(ROWS))
    metrics = fit(tmp_path, module, data, max_steps=1)[2].callback_metrics
    assert metrics["val/loss"] == pytest.approx(metrics["train/loss"].item(), rel=1e-5)


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


@pytest.mark.parametrize("kind", ["val", "test"])
def test_named_sets_are_evaluated_each_by_itself_and_all_together(tmp_path, kind):
    sets = {"short": ROWS[:5], "long-1.5": ROWS[5:7]}
    evaluate, module = {"val": L.Trainer.validate, "test": L.Trainer.test}[kind], SFTModule(tiny_model())

    def metrics_of(rows: object) -> dict[str, float]:
        data = make_data(**{f"{kind}_data": rows}, batch_size=3)
        return evaluate(make_trainer(tmp_path), module, data, verbose=False)[0]

    metrics = metrics_of(sets)
    expected = {f"{kind}/{name}": value for name, value in by_stage(metrics_of(ROWS[:7]), kind).items()}
    for name, rows in sets.items():
        expected |= {f"{kind}/{name}/{metric}": value for metric, value in by_stage(metrics_of(rows), kind).items()}
    assert len(expected) == 12
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_loaders_without_names_are_evaluated_like_named_sets(tmp_path):
    sets = {"0": ROWS[:5], "1": ROWS[5:7]}
    data, module = make_data(val_data=sets), SFTModule(tiny_model())
    (expected, _) = make_trainer(tmp_path).validate(module, data, verbose=False)
    loaders = [DataLoader([*loader], batch_size=None) for loader in data.val_dataloader()]
    assert make_trainer(tmp_path).validate(module, loaders, verbose=False)[0] == expected
    (alone,) = make_trainer(tmp_path).validate(module, loaders[:1], verbose=False)
    assert by_stage(alone, "val") == by_stage(expected, "val/0")


def by_stage(metrics: dict[str, float], kind: str) -> dict[str, float]:
    return {name.removeprefix(f"{kind}/"): value for name, value in metrics.items() if name.startswith(f"{kind}/")}


def test_an_interrupted_evaluation_leaves_nothing_in_the_next_one(tmp_path):
    class Interrupt(L.Callback):
        def on_validation_batch_end(self, *args):
            raise InterruptedError

    module, data = SFTModule(tiny_model()), make_data(val_data=ROWS[:10])
    (expected,) = make_trainer(tmp_path).validate(module, data, verbose=False)
    with pytest.raises(InterruptedError):
        make_trainer(tmp_path, callbacks=[Interrupt()]).validate(module, data, verbose=False)
    assert make_trainer(tmp_path).validate(module, data, verbose=False) == [expected]


def test_a_module_without_a_trainer_logs_nothing():
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        SFTModule(tiny_config()).log("val/own", 1.0)
