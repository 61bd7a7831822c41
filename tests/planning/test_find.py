"""Settings found by trial runs, which leave no trace."""

import json
import random

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.tuner import Tuner
from support.cuda import take_cpu_for_cuda
from support.models import character_tokenizer, tiny_config
from support.runs import ROWS, adamw

from lightning_sft import SFTDataModule, SFTModule, find_batch_size, find_lr
from lightning_sft.planning.batch_sizes import largest_size
from lightning_sft.planning.learning_rates import LearningRates, smooth

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def module(**options):
    return SFTModule(tiny_config(attention_dropout=0.1), **({"optimizer": adamw, "warmup_steps": 2} | options))


def rows(**options):
    return SFTDataModule(character_tokenizer(), ROWS, val_data=ROWS[:5], **({"batch_size": 8} | options))


def fit(sft, data, folder):
    options = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, "max_steps": 8}
    trainer = L.Trainer(**QUIET, **options, val_check_interval=4, default_root_dir=folder)
    trainer.fit(sft, data)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return metrics, [weight.detach().clone() for weight in sft.parameters()]


# -- learning rates ----------------------------------------------------------------------------------------------------


def test_smoothing_forgets_and_does_not_start_from_zero():
    assert smooth([1.0, 2.0, 4.0], 0.5) == pytest.approx([1.0, (0.5 + 2) / 1.5, (0.25 + 1 + 4) / 1.75])


def test_a_suggestion_is_a_fifth_of_the_rate_at_the_lowest_loss():
    found = LearningRates([1e-4, 1e-3, 1e-2, 1e-1], [3.0, 1.0, 0.5, 40.0])
    assert found.suggestion == 2e-3
    *lines, flag = str(found).splitlines()
    assert flag == "--model.optimizer.lr 2e-3"
    assert [line.split()[:2] for line in lines[1:]] == [
        [f"{lr:.1e}", f"{loss:.3f}"] for lr, loss in zip(found.lrs, found.smoothed, strict=True)
    ]
    assert [line.endswith("lowest") for line in lines[1:]] == [False, False, True, False]
    still_falling = LearningRates(found.lrs[:3], found.losses[:3])
    assert "still falls at the highest rate: raise `max_lr`" in str(still_falling)
    never_falling = LearningRates([1e-4, 1e-3], [1.0, 2.0])
    assert never_falling.suggestion is None
    assert "--model" not in str(never_falling)
    assert "No optimizer step" in str(LearningRates([], []))


class Parabola(SFTModule):
    """Its loss is `5 |w|^2`: gradient descent shrinks `w` by `1 - 10 lr`, so that it diverges above a rate of 0.2."""

    def training_step(self, batch, batch_idx):
        optimizer, weight = self.optimizers(), self.model.lm_head.weight
        optimizer.zero_grad()
        loss = 5 * weight.double().square().sum()
        self.manual_backward(loss)
        optimizer.step()
        self.log_dict({"train/loss": loss.detach(), "train/skipped_steps": 0.0})

    def on_before_optimizer_step(self, optimizer):
        """No clipping."""


def test_a_rate_is_judged_by_the_loss_after_its_step():
    sft = Parabola(tiny_config(), optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    found = find_lr(sft, rows(), 1e-3, 1e3, 61, **QUIET)
    assert found.lrs == pytest.approx([10 ** (-3 + step / 10) for step in range(len(found.lrs))])
    shrinks = [(1 - 10 * lr) ** 2 for lr in found.lrs]
    losses = np.array(found.losses)
    np.testing.assert_allclose(losses[1:] / losses[:-1], shrinks[1:], rtol=1e-3, atol=1e-9)
    assert found.lrs[losses.argmin()] == max(lr for lr in found.lrs if lr < 0.2)
    above = [value > 2 * min(found.smoothed[: step + 1]) for step, value in enumerate(found.smoothed)]
    assert above == [False] * (len(above) - 1) + [True]


@pytest.mark.parametrize(
    "find",
    [
        lambda *args: find_lr(*args, 1e-4, 1e30, 12, **QUIET),  # to where losses are no numbers
        lambda *args: find_batch_size(*args, **QUIET),
    ],
    ids=["find_lr", "find_batch_size"],
)
def test_a_run_after_finding_is_the_run_without(find, tmp_path, monkeypatch):
    take_cpu_for_cuda(monkeypatch)
    monkeypatch.chdir(tmp_path)
    expected = fit(module(), rows(), tmp_path)
    sft, data = module(), rows()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = find(sft, data)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert not list(tmp_path.iterdir())
    assert not isinstance(found, LearningRates) or (len(found.lrs) < 12 and np.isfinite(found.losses).all())
    assert all(weight.grad is None for weight in sft.parameters())
    metrics, weights = fit(sft, data, tmp_path)
    assert metrics == expected[0]
    assert all(torch.equal(weight, other) for weight, other in zip(weights, expected[1], strict=True))
    assert "train/skipped_steps" not in metrics  # again an error


@pytest.mark.parametrize(
    ("find", "options", "message"),
    [
        (find_lr, {"min_lr": 1e-2, "max_lr": 1e-3}, "`min_lr` is 0.01 and `max_lr` 0.001, expected positive numbers"),
        (find_lr, {"min_lr": 0.0}, "`min_lr` is 0.0"),
        (find_lr, {"num_steps": 1}, "`num_steps` is 1, expected at least 2"),
        (find_lr, {"strategy": "ddp_spawn", "devices": 2}, "take what they find with them"),
        (find_batch_size, {"margin": 1.0}, "`margin` is 1.0, expected a share"),
        (find_batch_size, {"memory_gib": 0}, "`memory_gib` is 0, expected a positive number"),
        (find_batch_size, {"strategy": "ddp", "devices": 2}, "`devices` are 2, but where memory runs out on one"),
    ],
)
def test_what_cannot_be_found_is_refused(find, options, message, monkeypatch):
    take_cpu_for_cuda(monkeypatch)
    with pytest.raises(ValueError, match=message):
        find(module(), rows(), **(QUIET | options))


@pytest.mark.parametrize(("method", "instead"), [("lr_find", "find_lr"), ("scale_batch_size", "find_batch_size")])
def test_lightning_s_own_finders_say_who_finds(method, instead):
    data = rows()
    data.batch_size = 8  # what Lightning looks for
    trainer = L.Trainer(**QUIET, logger=False, enable_checkpointing=False, max_steps=2)
    with pytest.raises(ValueError, match=rf"finds nothing .* Use `lightning_sft.{instead}\(module, datamodule\)`"):
        getattr(Tuner(trainer), method)(module(), datamodule=data)


# -- batch sizes -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.integers(0, 10**6), st.integers(0, 10**6))
def test_trying_comes_within_five_per_cent(start, more, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    end = start + more
    found = largest_size(fits, start, end)
    assert len(set(tried)) == len(tried)
    assert found == 0 if limit < start else found in tried
    assert found <= limit
    assert limit < start or found == end or limit < found + max(1, 0.05 * found) + 1
    assert all(start <= size <= end for size in tried)


class Watched(SFTModule):
    """Takes `per_token` bytes for each token of a microbatch, and no more than `limit` tokens."""

    per_token, limit = 2**20, 10**9

    def training_step(self, batch, batch_idx):
        (self.size,) = {microbatch.response_mask.numel() for microbatch in batch.microbatches}
        assert len(batch.microbatches) == 2
        assert all(microbatch.response_mask.all() for microbatch in batch.microbatches)
        if self.size > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().training_step(batch, batch_idx)

    def peak(self):
        return self.size * self.per_token


@pytest.fixture
def watched(monkeypatch):
    found = Watched(tiny_config(), optimizer=adamw)
    take_cpu_for_cuda(monkeypatch, peak=found.peak)
    return found


@pytest.mark.parametrize(("layout", "limit"), [("packed", 400), ("padded", 300), ("packed", 44)])
@pytest.mark.parametrize("of", ["the device", "`memory_gib`"])
def test_sizes_are_tried_until_memory_runs_out(watched, layout, limit, of):
    options = {}
    if of == "the device":
        watched.limit = limit
    else:
        options["memory_gib"] = limit / 1024
    found = find_batch_size(watched, rows(layout=layout), margin=0.1, **options, **QUIET)
    lengths = sorted((len(row["prompt"]) + len(row["output"]) for row in ROWS), reverse=True)  # and EOS, less one
    assert found.longest == lengths[0] == 44
    assert limit / 1.05 - 1 < found.most_tokens <= limit
    assert found.max_tokens_per_microbatch == max(int(0.9 * found.most_tokens), 44)
    costs = [sum(lengths[:n]) if layout == "packed" else n * 44 for n in range(1, len(lengths))]
    assert found.batch_size == sum(cost <= found.max_tokens_per_microbatch for cost in costs)
    tried = dict(found.tried)
    assert max(tried) > limit
    for size, peak in tried.items():  # padded rows of equal lengths may take a few tokens more
        assert peak is None or peak == pytest.approx(size * 2**20, rel=0.03)
        assert size <= limit or of != "the device" or peak is None
    assert f"--data.max_tokens_per_microbatch {found.max_tokens_per_microbatch}" in str(found).splitlines()
    assert f"Up to {found.batch_size} rows" in str(found)


def test_memory_that_runs_out_on_the_longest_row_is_said(watched):
    for options in ({"memory_gib": 0.001}, {}):
        with pytest.raises(ValueError, match="GiB of memory, too little for one row of 44 tokens, the longest"):
            find_batch_size(watched, rows(), **options, **QUIET)
        watched.limit = 0


def test_sizes_are_found_for_streamed_rows_of_which_longer_ones_may_follow(watched, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = SFTDataModule(character_tokenizer(), str(path), streaming=True, max_length=64, batch_size=8)
    found = find_batch_size(watched, data, **QUIET)
    assert found.longest == 63
    assert "All of the data" not in str(found)


def test_main_memory_is_not_tried_since_running_out_of_it_would_end_the_program():
    with pytest.raises(ValueError, match=r"`accelerator` is cpu, .* only tried on a CUDA device.* `lightning-sft est"):
        find_batch_size(module(), rows(), **QUIET)
