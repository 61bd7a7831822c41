"""Entropies against sums by hand, snapshots and finite differences."""

import math

import numpy as np
import pytest
import torch
from adapters import run_compute_entropy
from torch import Tensor
from torch.distributions import Categorical

from lightning_sft.model.log_probs import compute_entropy

INF = math.inf


def entropy_by_hand(logits: list[float]) -> float:
    """`-sum_v p_v log p_v` in Python's floats, a term without probability left out."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def entropies_by_hand(logits: Tensor) -> Tensor:
    return torch.tensor([[entropy_by_hand(position) for position in row] for row in logits.tolist()])


def test_compute_entropy_equals_the_published_snapshot(shared_data):
    torch.manual_seed(42)
    expected = np.load(shared_data / "cs336_snapshots" / "test_compute_entropy.npz")["array"]
    torch.testing.assert_close(run_compute_entropy(torch.randn(2, 10, 100)), torch.from_numpy(expected))


def test_compute_entropy_of_known_distributions():
    probabilities = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0]]])
    torch.testing.assert_close(compute_entropy(torch.full((1, 2, 1000), -7.0)), torch.full((1, 2), math.log(1000)))
    expected = torch.tensor([[1.0, 1.5, 0.0]]) * math.log(2)  # 1, 1.5 and 0 bits
    torch.testing.assert_close(compute_entropy(probabilities.log()), expected)


@pytest.mark.parametrize("offset", [0, 1e4, -1e4, 1e8, -1e30])
def test_compute_entropy_equals_the_sum_by_hand_however_large_the_logits_are(offset):
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)) + offset  # rounded before both
    torch.testing.assert_close(compute_entropy(logits), entropies_by_hand(logits))


def test_compute_entropy_of_logits_very_far_apart_is_zero():
    logits = torch.tensor([[[1e4, -1e4, 0.0], [3e38, -3e38, 0.0]]])
    torch.testing.assert_close(compute_entropy(logits), torch.zeros(1, 2))


def test_compute_entropy_adds_nothing_for_logits_of_minus_infinity():
    logits = torch.tensor([[[0.3, -INF, 1.1, -INF], [-INF, 5.0, -INF, -INF]]])
    torch.testing.assert_close(compute_entropy(logits), torch.tensor([[entropy_by_hand([0.3, 1.1]), 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_entropy_upcasts_half_precision_before_anything_else(dtype):
    logits = (3 * torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    torch.testing.assert_close(compute_entropy(logits), entropies_by_hand(logits))  # float32, to its precision


def test_compute_entropy_keeps_float64():
    logits = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = Categorical(logits=logits).entropy()
    torch.testing.assert_close(compute_entropy(logits), expected, rtol=1e-12, atol=0)


def test_compute_entropy_has_the_gradient_of_finite_differences():
    logits = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compute_entropy, (logits,))


def test_compute_entropy_with_logits_of_minus_infinity_has_the_gradient_of_the_others_alone():
    upstream = torch.tensor([[100.0, -100.0]])
    some = torch.tensor([[[0.3, -INF, 1.1], [-INF, -INF, 5.0]]], requires_grad=True)
    compute_entropy(some).backward(upstream)
    alone = torch.tensor([[[0.3, 1.1]]], requires_grad=True)
    compute_entropy(alone).backward(upstream[:, :1])
    first, second = alone.grad.flatten().tolist()
    torch.testing.assert_close(some.grad, torch.tensor([[[first, 0.0, second], [0.0, 0.0, 0.0]]]))
    assert first != 0


def test_compute_entropy_has_a_finite_gradient_for_huge_logits():
    logits = torch.tensor([[[1e4, 1e4 - 1, -1e4], [3e38, -3e38, 0.0]]], requires_grad=True)
    compute_entropy(logits).backward(torch.full((1, 2), 100.0))
    q = 1 / (1 + math.e)  # of the second logit; dH / dx_v = -p_v (log p_v + H), here +- 100 q (1 - q)
    expected = 100 * q * (1 - q)
    torch.testing.assert_close(logits.grad, torch.tensor([[[-expected, expected, 0.0], [0.0, 0.0, 0.0]]]))
