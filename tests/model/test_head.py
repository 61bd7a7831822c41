"""The head against full logits in float64, and against finite differences."""

import itertools
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_sft.model.fused import fused
from lightning_sft.model.head import Head, score_labels
from lightning_sft.model.tiles import LogitTransform, Tiling, score_tile

ROWS, HIDDEN, VOCAB = 37, 6, 50
# Several tiles in both directions and several blocks, each with a smaller one at the end.
TILING = Tiling(rows=5, width=16, block_bytes=20 * VOCAB, score=score_tile)
score = partial(score_labels, tiling=TILING)


def make(dtype=torch.float64, bias=False, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in (rows, VOCAB))
    vector = torch.randn(VOCAB, generator=generator, dtype=torch.float64) if bias else None
    labels = torch.randint(VOCAB, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    tensors = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, vector)]
    return *tensors, labels, weights


def naive(hidden, weight, bias, labels, scale=1.0, softcap=None):
    """Full logits, and nothing clever."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    probabilities = logits.softmax(dim=-1)
    log_probs = probabilities.gather(-1, labels[:, None])[:, 0].log()
    entropy = -(probabilities * probabilities.log()).sum(dim=-1)
    return log_probs, entropy, logits.argmax(dim=-1) == labels


def gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [tensor for tensor in inputs if tensor is not None], retain_graph=True))


@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [*itertools.product((False, True), (1.0, 0.3), (None, 2.0))], ids=str
)
@pytest.mark.parametrize("known", [True, False], ids=["known weights", "any gradient"])
def test_scores_and_gradients_equal_those_of_full_logits(bias, scale, softcap, known):
    hidden, weight, vector, labels, weights = make(bias=bias)
    head = Head(weight, vector, LogitTransform(scale, softcap))
    given = score(hidden, head, labels, token_weights=weights if known else None, return_is_top1=True)
    log_probs, entropy, is_top1 = naive(hidden, weight, vector, labels, scale, softcap)
    torch.testing.assert_close(given.log_probs.detach(), log_probs.detach())
    torch.testing.assert_close(given.token_entropy, entropy.detach())
    assert given.is_top1.tolist() == is_top1.tolist()
    expected = -(weights * log_probs).sum()
    loss = given.loss if known else -(weights * given.log_probs).sum()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        gradients(loss, hidden, weight, vector), gradients(expected, hidden, weight, vector), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_both_modes_pass_gradcheck(softcap):
    hidden, weight, bias, labels, weights = make(bias=True, rows=7)

    def log_probs(*inputs):
        scores = score(inputs[0], Head(*inputs[1:], LogitTransform(0.7, softcap)), labels)
        return scores.log_probs, scores.token_entropy

    def loss(*inputs):
        return score(inputs[0], Head(*inputs[1:], LogitTransform(0.7, softcap)), labels, token_weights=weights).loss

    assert torch.autograd.gradcheck(log_probs, (hidden, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)


@pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [*itertools.product((False, True), (1.0, 0.3), (None, 2.0))], ids=str
)
@pytest.mark.parametrize("what", ["entropies alone", "a bonus"])
def test_entropies_have_the_gradients_of_full_logits(bias, scale, softcap, what):
    hidden, weight, vector, labels, weights = make(bias=bias)
    bonus = 0.5 * weights.flip(0) - 0.2  # of either sign
    given = score(hidden, Head(weight, vector, LogitTransform(scale, softcap)), labels)
    log_probs, entropy, _ = naive(hidden, weight, vector, labels, scale, softcap)
    if what == "entropies alone":
        loss, expected = (bonus * given.token_entropy).sum(), (bonus * entropy).sum()
    else:
        loss, expected = (
            -(weights * each_log_probs + bonus * each_entropy).sum()
            for each_log_probs, each_entropy in ((given.log_probs, given.token_entropy), (log_probs, entropy))
        )
    for ours, theirs in zip(
        gradients(loss, hidden, weight, vector), gradients(expected, hidden, weight, vector), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_scaled_loss_has_scaled_gradients_and_can_be_backpropagated_twice():
    hidden, weight, _, labels, weights = make()
    loss = score(hidden, Head(weight), labels, token_weights=weights).loss
    once = gradients(loss, hidden, weight)
    thrice = gradients(3 * loss, hidden, weight)
    for single, triple in zip(once, thrice, strict=True):
        torch.testing.assert_close(triple, 3 * single)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(known, frozen):
    hidden, weight, _, labels, weights = make()
    full = score(hidden, Head(weight), labels, token_weights=weights).loss
    expected = dict(zip(("hidden", "weight"), gradients(full, hidden, weight), strict=True))
    inputs = {"hidden": hidden.detach(), "weight": weight.detach()}
    trained = next(name for name in inputs if name != frozen)
    inputs[trained].requires_grad_()
    scores = score(inputs["hidden"], Head(inputs["weight"]), labels, token_weights=weights if known else None)
    (scores.loss if known else -(weights * scores.log_probs).sum()).backward()
    torch.testing.assert_close(inputs[trained].grad, expected[trained])
    assert inputs[frozen].grad is None


def with_gradients(scores):
    return {name for name, value in vars(scores).items() if value is not None and value.requires_grad}


def test_only_the_loss_or_the_scores_carry_a_gradient():
    hidden, weight, _, labels, weights = make()
    free = score(hidden, Head(weight), labels, return_is_top1=True)
    bound = score(hidden, Head(weight), labels, token_weights=weights, return_is_top1=True)
    assert with_gradients(free) == {"log_probs", "token_entropy"}
    assert with_gradients(bound) == {"loss"}
    with torch.no_grad():
        silent = score(hidden, Head(weight), labels, token_weights=weights)
    assert not with_gradients(silent)
    torch.testing.assert_close(silent.loss, bound.loss.detach())


def test_without_any_row_the_loss_is_zero_and_so_are_the_gradients():
    hidden, weight, bias, labels, weights = make(bias=True, rows=0)
    for scores in (
        score(hidden, Head(weight, bias), labels, token_weights=weights).loss,
        score(hidden, Head(weight, bias), labels, return_is_top1=True).log_probs.sum(),
    ):
        assert scores.item() == 0
        assert [gradient.abs().sum().item() for gradient in gradients(scores, hidden, weight, bias)] == [0, 0, 0]


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_no_digits_are_lost_to_logits_far_from_zero(offset):
    hidden, weight, _, labels, _ = make(torch.float32)
    bias = torch.full((VOCAB,), offset)
    with torch.no_grad():
        scores = score(hidden, Head(weight, bias), labels)
        rounded = (hidden @ weight.t() + bias).double()  # what float32 can tell apart there
    exact = torch.distributions.Categorical(logits=rounded)
    torch.testing.assert_close(scores.token_entropy.double(), exact.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.log_probs.double(), exact.log_prob(labels), rtol=1e-5, atol=2e-3)


def test_a_distribution_on_one_token_has_no_entropy_and_no_positive_log_prob():
    weight = torch.eye(VOCAB)[:, :VOCAB]
    hidden = 200.0 * torch.eye(VOCAB)[:20]
    scores = score(hidden.bfloat16(), Head(weight.bfloat16()), torch.arange(20), return_is_top1=True)
    assert scores.log_probs.tolist() == [0.0] * 20
    assert scores.token_entropy.abs().max() < 1e-6
    assert scores.is_top1.all()


def test_of_equal_logits_the_first_is_the_top_one_as_for_argmax():
    weight = torch.zeros(VOCAB, HIDDEN)
    labels = torch.tensor([0, 1, 15, 16, 49])
    scores = score(torch.ones(5, HIDDEN), Head(weight), labels, return_is_top1=True)
    assert scores.is_top1.tolist() == [True, False, False, False, False]


def test_float16_keeps_the_digits_of_small_gradients_under_a_loss_scaler():
    """Of weights that are known beforehand, see `test_token_loss.py`."""
    hidden, weight, _, labels, _ = make(torch.float16)
    weights, scale = torch.full((ROWS,), 1e-5), 2.0**14
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = gradients(-(weights.double() * naive(*exact, None, labels)[0]).sum(), *exact)
    loss = -(weights * score(hidden, Head(weight), labels).log_probs).sum()
    for ours, theirs in zip(gradients(scale * loss, hidden, weight), expected, strict=True):
        assert (ours.double() / scale - theirs).norm() < 0.002 * theirs.norm()


def weight_gradient(hidden, weight, labels, dtype, tiling):
    weight = weight.to(dtype).requires_grad_()
    weights = torch.full((len(labels),), 1 / len(labels))
    scores = score_labels(hidden.to(dtype), Head(weight), labels, token_weights=weights, tiling=tiling)
    scores.loss.backward()
    return weight.grad.double()


@pytest.mark.parametrize("rows_per_block", [8, 64, 2048])
def test_half_precision_weight_gradients_do_not_get_worse_with_the_number_of_blocks(rows_per_block):
    """256 blocks of 8 rows, added in bfloat16 one by one, would be off by 1 % and more."""
    tiling = Tiling(rows=8, width=16, block_bytes=rows_per_block * 60 * 2, score=score_tile)
    assert tiling.rows_per_block(60, torch.bfloat16) == rows_per_block
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 32, generator=generator).bfloat16()
    weight = torch.randn(60, 32, generator=generator).bfloat16()
    labels = (torch.rand(2048, generator=generator) ** 4 * 60).long()  # a few labels are frequent
    exact, given = (weight_gradient(hidden, weight, labels, each, tiling) for each in (torch.float64, torch.bfloat16))
    assert (given - exact).norm() < 0.0035 * exact.norm()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 2.0])
def test_compiled_tiles_as_on_cuda_say_the_same(softcap):
    hidden, weight, bias, labels, weights = make(bias=True)
    head = Head(weight, bias, LogitTransform(0.5, softcap))
    plain, compiled = (
        score_labels(hidden, head, labels, token_weights=weights, return_is_top1=True, tiling=tiling)
        for tiling in (TILING, replace(TILING, score=fused(score_tile)))
    )
    for name, values in vars(plain).items():
        torch.testing.assert_close(getattr(compiled, name), values)
    for one, other in zip(*(gradients(run.loss, hidden, weight, bias) for run in (plain, compiled)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_code_is_compiled_for_each_width_of_a_tile_and_for_any_number_of_rows(monkeypatch):
    compiled_for = []

    def backend(graph, inputs):
        compiled_for.extend(each.shape for each in inputs if isinstance(each, Tensor) and each.dim() == 2)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    tiling = Tiling(rows=64, width=32, block_bytes=2**20, score=fused.__wrapped__(score_tile))
    for rows in (37, 20, 29, 32):
        hidden, weight, _, labels, weights = make(rows=rows)
        score_labels(hidden, Head(weight), labels, token_weights=weights, tiling=tiling)
    assert [width for _, width in compiled_for] == [32, VOCAB - 32]


def test_tiles_on_cuda_are_of_one_width_where_the_vocabulary_allows_it():
    tiling = Tiling.for_device("cuda", fused.__wrapped__(score_tile))
    widths = [tiling.width_of_tiles(size) for size in (151936, 128256, 32000, 50257, 1000)]
    assert widths == [18992, 16032, 16000, 20480, 1000]


def test_a_single_row_is_not_compiled_for_and_without_a_compiler_nothing_is(monkeypatch):
    hidden, weight, _, labels, _ = make(rows=36)  # of which the last tile has one
    seen = []

    def watched(products, *args):
        seen.append(len(products))
        return score_tile(products, *args)

    score_labels(hidden, Head(weight), labels, tiling=replace(TILING, score=watched))
    assert set(seen) == {5}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="There is no C compiler"):
        assert fused.__wrapped__(score_tile) is score_tile


def test_memory_is_that_of_tiles_not_of_logits():
    """The largest tensor ever made, watched as torch makes them."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return result

    hidden, weight, _, labels, weights = make(torch.float32)
    with Watch():
        score(hidden, Head(weight), labels, token_weights=weights.float()).loss.backward()
        score(hidden, Head(weight), labels).log_probs.sum().backward()
    # Weights and hidden states, or a tile of all rows; not the 1850 logits.
    assert largest == max(VOCAB * HIDDEN, ROWS * 16)
