"""The learning-rate range test: where the loss falls, and where the search ends."""

import numpy as np
import pytest
import torch
from support.models import tiny_config
from support.trials import QUIET, rows

from lightning_sft import SFTModule, find_lr
from lightning_sft.planning.learning_rates import LearningRates, smooth


def test_smoothing_forgets_and_does_not_start_from_zero():
    assert smooth([1.0, 2.0, 4.0]) == pytest.approx([1.0, (0.9 + 2) / 1.9, (0.81 + 1.8 + 4) / 2.71])


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


def test_a_rate_is_judged_by_the_loss_after_its_step():
    sft = Parabola(tiny_config(), max_grad_norm=None, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    found = find_lr(sft, rows(), 1e-3, 1e3, 61, **QUIET)
    assert found.lrs == pytest.approx([10 ** (-3 + step / 10) for step in range(len(found.lrs))])
    shrinks = [(1 - 10 * lr) ** 2 for lr in found.lrs]
    losses = np.array(found.losses)
    np.testing.assert_allclose(losses[1:] / losses[:-1], shrinks[1:], rtol=1e-3, atol=1e-9)
    assert found.lrs[losses.argmin()] == max(lr for lr in found.lrs if lr < 0.2)
    above = [value > 2 * min(found.smoothed[: step + 1]) for step, value in enumerate(found.smoothed)]
    assert above == [False] * (len(above) - 1) + [True]
