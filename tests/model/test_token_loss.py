"""Losses other than the negative log-likelihood, against full logits."""

import itertools

import pytest
import torch
from support.models import tiny_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft.model.head import Head, score_labels
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.tiles import LogitTransform, Tiling, score_tile
from lightning_sft.model.token_loss import TokenLoss

ROWS, HIDDEN, VOCAB = 37, 6, 50
# Several tiles in both directions and several blocks, each with a smaller one at the end.
TILING = Tiling(rows=5, width=16, block_bytes=20 * VOCAB, score=score_tile)


def focal(log_probs):
    return -((1 - log_probs.exp()) ** 2) * log_probs


LOSSES = {
    "nll": TokenLoss(),
    "dft": TokenLoss("dft"),
    "smoothed": TokenLoss(label_smoothing=0.3),
    "focal": TokenLoss(focal),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def naive(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, with a softmax of all logits."""
    if name == "smoothed":
        return cross_entropy(logits, labels, reduction="none", label_smoothing=0.3)
    p = logits.softmax(dim=-1).gather(-1, labels[:, None])[:, 0]
    weights = {"nll": torch.ones_like(p), "dft": p.detach(), "focal": (1 - p) ** 2}
    return -weights[name] * p.log()


def make(dtype=torch.float64, bias=False, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    hidden, weight, vector = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in ([hidden, weight, vector] if bias else [hidden, weight])]
    return inputs, labels, weights.to(dtype)


@each_loss
@pytest.mark.parametrize(("bias", "scale", "rows"), [*itertools.product((False, True), (1.0, 0.3), (37, 0))], ids=str)
def test_loss_and_gradients_equal_those_of_full_logits(name, bias, scale, rows):
    inputs, labels, weights = make(bias=bias, rows=rows)
    head = Head(*inputs[1:], transform=LogitTransform(scale))
    given = score_labels(inputs[0], head, labels, token_weights=weights, token_loss=LOSSES[name], tiling=TILING)
    logits = scale * (inputs[0] @ inputs[1].t() + (inputs[2] if bias else 0))
    expected = (weights * naive(name, logits, labels)).sum()
    torch.testing.assert_close(given.loss, expected)
    torch.testing.assert_close(given.log_probs, -naive("nll", logits, labels).detach())
    for ours, theirs in zip(*(torch.autograd.grad(loss, inputs) for loss in (given.loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@each_loss
def test_no_digits_are_lost_under_autocast_nor_to_logits_far_from_zero(name):
    (hidden, weight), labels, weights = make(torch.float32)
    rounded = [tensor.detach().bfloat16().double().requires_grad_() for tensor in (hidden, weight)]
    options = {"token_weights": weights, "token_loss": LOSSES[name], "tiling": TILING}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = score_labels(hidden, Head(weight), labels, **options).loss
    assert loss.dtype == torch.float32
    assert loss == score_labels(hidden.bfloat16(), Head(weight.bfloat16()), labels, **options).loss  # multiplied so
    expected = (weights * naive(name, rounded[0] @ rounded[1].t(), labels)).sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    gradients = (torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, rounded))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.03 * theirs.norm()  # products are rounded, and with them factors of dft
    with torch.no_grad():
        far = score_labels(hidden, Head(weight, torch.full((VOCAB,), 1e4)), labels, **options).loss
        logits = (hidden @ weight.t() + 1e4).double()  # what float32 can tell apart there
    torch.testing.assert_close(far.double(), (weights * naive(name, logits, labels)).sum(), rtol=1e-4, atol=0)


@each_loss
def test_float16_keeps_the_digits_of_small_weights_under_a_loss_scaler(name):
    inputs, labels, _ = make(torch.float16)
    weights, scale = torch.full((ROWS,), 1e-5), 2.0**14
    options = {"token_weights": weights, "token_loss": LOSSES[name], "tiling": TILING}
    loss = score_labels(inputs[0], Head(inputs[1]), labels, **options).loss
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = (weights * naive(name, exact[0] @ exact[1].t(), labels)).sum()
    gradients = (torch.autograd.grad(scale * loss, inputs), torch.autograd.grad(scale * expected, exact))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours.double() - theirs).norm() < 0.005 * theirs.norm()


class WithMore(nn.Linear):
    """A head that is more than a linear layer."""

    def forward(self, hidden):
        return super().forward(hidden) + hidden.mean(dim=-1, keepdim=True) * torch.arange(self.out_features)


def model_of(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 131}
    if kind == "soft-capped":
        more = {"intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **(sizes | more)))
    model = tiny_model(initializer_range=0.5)
    if kind == "not linear":
        model.lm_head = WithMore(16, 131, bias=False)
    return model


@each_loss
@pytest.mark.parametrize("kind", ["linear", "soft-capped", "not linear"])
def test_the_loss_of_a_model_equals_the_naive_formula_whatever_its_head(name, kind):
    model = model_of(kind).double().eval()
    tokens = torch.randint(131, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) >= torch.tensor([[4], [8], [2]])
    input_ids, labels, positions = tokens[:, :-1], tokens[:, 1:], mask.flatten().nonzero()[:, 0]
    loss = score_responses(model, input_ids, labels, positions, normalize_constant=4.0, token_loss=LOSSES[name]).loss
    expected = naive(name, model(input_ids).logits[mask], labels[mask]).sum() / 4
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(each, parameters) for each in (loss, expected)), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9
