from itertools import product

import numpy as np
import pytest
import torch
from adapters import run_masked_normalize, run_sft_microbatch_train_step
from torch import Tensor

from lightning_sft.errors import SettingsError
from lightning_sft.training.losses import masked_normalize, sft_loss, sft_microbatch_train_step

NAN, INF = float("nan"), float("inf")
MASK_TYPES = [torch.bool, torch.int64, torch.float32, torch.bfloat16]


def snapshot(shared_data, name: str) -> dict[str, Tensor]:
    stored = np.load(shared_data / "cs336_snapshots" / f"{name}.npz")
    return {key: torch.from_numpy(stored[key]) for key in stored}


def published_inputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(42)
    tensor = torch.randn(shape)
    torch.manual_seed(42)
    return tensor, torch.rand_like(tensor) > 0.5


def random_microbatch(num_sequences: int = 7, length: int = 6) -> tuple[Tensor, Tensor]:
    """Log-probabilities in float64 and a mask that marks another number of tokens in each row, none in the last."""
    generator = torch.Generator().manual_seed(0)
    log_probs = -torch.rand(num_sequences, length, generator=generator, dtype=torch.float64)
    mask = torch.arange(length) >= torch.tensor([[0, 5, 3, 1, 4, 2, 6]]).T[-num_sequences:]
    return log_probs, mask


def sum_by_loops(tensor: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    """Every element where the mask is 1 added to the cell that it falls into without `dim`."""
    axes = range(tensor.ndim) if dim is None else [range(tensor.ndim)[dim]]
    cells: dict[tuple[int, ...], float] = {}
    for index in product(*map(range, tensor.shape)):
        cell = tuple(position for axis, position in enumerate(index) if axis not in axes)
        cells[cell] = cells.get(cell, 0.0) + (tensor[index].item() if mask[index].item() == 1 else 0.0)
    shape = [size for axis, size in enumerate(tensor.shape) if axis not in axes]
    return torch.tensor([cells[cell] for cell in product(*map(range, shape))], dtype=tensor.dtype).reshape(shape)


@pytest.mark.parametrize(("name", "dim"), [("dim0", 0), ("dim1", 1), ("dimlast", -1), ("dimNone", None)])
def test_masked_normalize_equals_the_published_snapshot(shared_data, name, dim):
    tensor, mask = published_inputs(2, 10, 100)
    expected = snapshot(shared_data, f"test_masked_normalize_{name}")["array"]
    torch.testing.assert_close(run_masked_normalize(tensor, mask, 42.0, dim), expected)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("dim", [None, 0, 1, 2, -1, -2, -3])
def test_masked_normalize_equals_loops_over_any_dimension_with_any_mask(dim, mask_type):
    tensor = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = (torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) > 0.5).to(mask_type)
    torch.testing.assert_close(masked_normalize(tensor, mask, 0.7, dim), sum_by_loops(tensor, mask, dim) / 0.7)


def test_masked_normalize_by_hand():
    tensor, mask = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]), torch.tensor([[1, 0, 1], [0, 1, 0]])
    assert masked_normalize(tensor, mask, 2.0).tolist() == 10.5  # (1 + 4 + 16) / 2
    assert masked_normalize(tensor, mask, 2.0, dim=0).tolist() == [0.5, 8.0, 2.0]
    assert masked_normalize(tensor, mask, 2.0, dim=1).tolist() == [2.5, 8.0]


def test_masked_normalize_takes_one_and_nothing_else_for_marked():
    mask = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.0, NAN])
    assert masked_normalize(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), mask, 1.0) == 1.0


@pytest.mark.parametrize("mask_type", MASK_TYPES)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_masked_normalize_lets_nothing_outside_the_mask_contribute_or_get_a_gradient(dim, mask_type):
    tensor = torch.tensor([[1.0, NAN, INF], [-INF, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[1, 0, 0], [0, 1, 1]]).to(mask_type)
    result = masked_normalize(tensor, mask, 4.0, dim)
    expected = {None: 1.5, 0: [0.25, 0.5, 0.75], 1: [0.25, 1.25]}
    assert result.tolist() == expected[dim]
    result.sum().backward()
    assert tensor.grad.tolist() == [[0.25, 0.0, 0.0], [0.0, 0.25, 0.25]]


def test_masked_normalize_with_an_empty_mask_is_zero():
    tensor = torch.full((2, 3), NAN)
    assert masked_normalize(tensor, torch.zeros(2, 3), 5.0).tolist() == 0.0
    assert masked_normalize(tensor, torch.zeros(2, 3), 5.0, dim=-1).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masked_normalize_keeps_the_type_of_the_tensor(dtype):
    assert masked_normalize(torch.ones(3, dtype=dtype), torch.ones(3), 2.0).dtype == dtype


def test_sft_loss_per_token_divides_the_sum_by_the_tokens_of_the_step():
    log_probs, mask = random_microbatch()
    total = 0.0
    for row, column in product(range(7), range(6)):
        total -= log_probs[row, column].item() if mask[row, column] else 0.0
    # 100 tokens in the step, of which these 21 are a part
    loss = sft_loss(log_probs, mask, num_response_tokens=100, num_sequences=3)
    assert loss.item() == pytest.approx(total / 100)


def test_sft_loss_per_sequence_divides_the_sum_by_the_constant_and_the_sequences_of_the_step():
    log_probs, mask = random_microbatch()
    total = 0.0
    for row in range(7):
        total -= sum(log_probs[row, column].item() for column in range(6) if mask[row, column]) / 9.0
    options = {"loss_normalization": "sequence", "normalize_constant": 9.0}
    loss = sft_loss(log_probs, mask, num_response_tokens=100, num_sequences=20, **options)
    assert loss.item() == pytest.approx(total / 20)


@pytest.mark.parametrize("loss_normalization", ["token", "sequence"])
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [5, 2], [4, 0, 2, 1]])
def test_sft_loss_and_its_gradient_do_not_depend_on_how_a_step_is_split(sizes, loss_normalization):
    def step(sizes: list[int]) -> tuple[float, Tensor]:
        log_probs, mask = random_microbatch()
        log_probs.requires_grad_()
        totals = {"num_response_tokens": int(mask.sum()), "num_sequences": len(mask)}
        constant, loss = 3.0 if loss_normalization == "sequence" else 1.0, 0.0
        for part, part_mask in zip(log_probs.split(sizes), mask.split(sizes), strict=True):
            share = sft_loss(
                part, part_mask, loss_normalization=loss_normalization, normalize_constant=constant, **totals
            )
            share.backward()
            loss += share.item()
        return loss, log_probs.grad

    whole_loss, whole_gradient = step([7])
    loss, gradient = step(sizes)
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=0)
    divisor = 21 if loss_normalization == "token" else 3.0 * 7
    torch.testing.assert_close(whole_gradient, -random_microbatch()[1].double() / divisor)


def test_sft_loss_per_token_weighs_every_token_of_a_step_alike_and_per_sequence_leaves_that_to_the_constant():
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    log_probs = -torch.tensor([[9.0, 9.0, 4.0], [1.0, 1.0, 1.0]])
    totals = {"num_response_tokens": 4, "num_sequences": 2}
    assert sft_loss(log_probs, mask, **totals).item() == 1.75  # 7 / 4, not the mean of 4 and 1
    assert sft_loss(log_probs, mask, loss_normalization="sequence", **totals).item() == 3.5  # 7 / 2


def test_sft_loss_per_sequence_equals_sft_microbatch_train_step_accumulated_over_equal_microbatches():
    log_probs, mask = random_microbatch(num_sequences=6)
    ours, course = log_probs.clone().requires_grad_(), log_probs.clone().requires_grad_()
    options = {"loss_normalization": "sequence", "normalize_constant": 3.0}
    loss = sft_loss(ours, mask, num_response_tokens=int(mask.sum()), num_sequences=6, **options)
    loss.backward()
    course_loss = sum(
        sft_microbatch_train_step(part, part_mask, gradient_accumulation_steps=3, normalize_constant=3.0)[0]
        for part, part_mask in zip(course.split(2), mask.split(2), strict=True)
    )
    torch.testing.assert_close(loss.detach(), course_loss)
    torch.testing.assert_close(ours.grad, course.grad)


def test_sft_loss_lets_no_masked_value_contribute():
    log_probs = torch.tensor([[NAN, -2.0], [-INF, -4.0]], requires_grad=True)
    loss = sft_loss(log_probs, torch.tensor([[0, 1], [0, 1]]), num_response_tokens=2, num_sequences=2)
    loss.backward()
    assert loss.item() == 3.0
    assert log_probs.grad.tolist() == [[0.0, -0.5], [0.0, -0.5]]


@pytest.mark.parametrize(("name", "constant"), [("", 1.0), ("_normalize", 42.0)])
def test_sft_microbatch_train_step_equals_the_published_snapshot(shared_data, name, constant):
    log_probs, mask = published_inputs(2, 10)
    log_probs.requires_grad_()
    loss, _ = run_sft_microbatch_train_step(log_probs, mask, 2, constant)
    expected = snapshot(shared_data, f"test_sft_microbatch_train_step{name}")
    torch.testing.assert_close(loss, expected["loss"])
    torch.testing.assert_close(log_probs.grad, expected["policy_log_probs_grad"])


def test_sft_microbatch_train_step_equals_the_published_snapshot_of_ten_steps(shared_data):
    log_probs, mask = published_inputs(2, 10)
    log_probs.requires_grad_()
    losses, gradients = [], []
    for _ in range(10):
        losses.append(run_sft_microbatch_train_step(log_probs, mask, 2)[0])
        gradients.append(log_probs.grad)  # ten times the same tensor, as it was stored: the gradient after ten steps
    expected = snapshot(shared_data, "test_sft_microbatch_train_step_10_steps")
    torch.testing.assert_close(torch.stack(losses), expected["loss"])
    torch.testing.assert_close(torch.stack(gradients), expected["policy_log_probs_grad"])


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_sft_microbatch_train_step_as_worked_by_hand(mask_type):
    log_probs = -torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    log_probs.requires_grad_()
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(mask_type)
    loss, metadata = sft_microbatch_train_step(log_probs, mask, gradient_accumulation_steps=2, normalize_constant=4.0)
    assert loss.item() == 0.5625  # sequences (2 + 3) / 4 and 4 / 4, their mean 1.125, over 2 steps
    assert log_probs.grad.tolist() == [[0.0, -0.0625, -0.0625], [-0.0625, 0.0, 0.0]]  # -1 / (4 * 2 * 2)
    expected = {"loss": 0.5625, "num_response_tokens": 3, "mean_log_prob": -3.0}  # -(2 + 3 + 4) / 3
    assert {name: value.item() for name, value in metadata.items()} == expected


def test_sft_microbatch_train_step_divides_by_no_constant_unless_given_one():
    log_probs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    for constant in ({}, {"normalize_constant": None}):
        assert run_sft_microbatch_train_step(log_probs, torch.ones(1, 2), 1, **constant)[0].item() == 3.0


def test_a_mask_of_fewer_dimensions_counts_in_each_sequence():
    log_probs = torch.full((2, 3), -3.0, requires_grad=True)
    metadata = sft_microbatch_train_step(log_probs, torch.tensor([0, 1, 1]), 1)[1]
    assert {name: value.item() for name, value in metadata.items()} == {
        "loss": 6.0,
        "num_response_tokens": 4,
        "mean_log_prob": -3.0,
    }


def test_a_microbatch_without_a_response_token_has_no_mean_log_prob_and_no_loss():
    loss, metadata = sft_microbatch_train_step(torch.full((1, 2), -3.0, requires_grad=True), torch.zeros(1, 2), 1)
    assert loss.item() == 0.0
    assert metadata["mean_log_prob"].isnan()


def test_the_course_s_calls_of_masked_normalize_by_keyword_work_in_its_stub_s_order():
    tensor, mask = published_inputs(2, 10, 100)
    given = run_masked_normalize(tensor=tensor, mask=mask, dim=1, normalize_constant=42.0)
    assert torch.equal(given, masked_normalize(tensor, mask, 42.0, 1))


def test_sft_microbatch_train_step_returns_the_loss_that_it_backpropagated_detached():
    log_probs, mask = random_microbatch()
    log_probs.requires_grad_()
    loss, metadata = sft_microbatch_train_step(log_probs, mask, 3, 5.0)
    # The loss is linear in the log-probabilities: it equals its gradient times them.
    torch.testing.assert_close(loss, (log_probs.grad * log_probs).sum().detach())
    assert loss.shape == ()
    assert not loss.requires_grad
    assert not any(value.requires_grad for value in metadata.values())


def test_sft_microbatch_train_step_accumulates_over_microbatches_to_the_gradient_of_the_whole_batch():
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]] * 2)

    def accumulated(num_microbatches: int) -> tuple[float, Tensor]:
        weight = torch.ones(4, requires_grad=True)
        loss = 0.0
        for part, part_mask in zip(inputs.chunk(num_microbatches), mask.chunk(num_microbatches), strict=True):
            loss += sft_microbatch_train_step(part * weight, part_mask, num_microbatches)[0].item()
        return loss, weight.grad

    for num_microbatches in (1, 2, 3, 6):
        loss, gradient = accumulated(num_microbatches)
        assert loss == pytest.approx(-(inputs * mask).sum().item() / 6, abs=1e-6)
        torch.testing.assert_close(gradient, -(inputs * mask).sum(dim=0) / 6)


def test_sft_microbatch_train_step_lets_no_masked_value_contribute():
    log_probs = torch.tensor([[NAN, -2.0], [-INF, -4.0]], requires_grad=True)
    loss, _ = sft_microbatch_train_step(log_probs, torch.tensor([[0, 1], [0, 1]]), 1)
    assert loss.item() == 3.0
    assert log_probs.grad.tolist() == [[0.0, -0.5], [0.0, -0.5]]


def test_shapes_and_numbers_of_steps_that_would_give_another_loss_are_refused():
    with pytest.raises(SettingsError, match=r"`mask` is of shape \(2, 3\), expected that of `tensor`, \(2, 1\)"):
        masked_normalize(torch.ones(2, 1), torch.ones(2, 3), 1.0)
    with pytest.raises(SettingsError, match="`gradient_accumulation_steps` is 0, expected at least 1"):
        sft_microbatch_train_step(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3), 0)
