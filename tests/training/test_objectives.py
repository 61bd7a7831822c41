"""Other losses and noise in whole runs: exact under any split, and refused where they make no sense."""

import pytest
import torch
from support.processes import Processes
from support.runs import StopAt, train

from lightning_sft import SFTModule
from lightning_sft.errors import SettingsError


def focal(log_probs):
    return -((1 - log_probs.exp()) ** 2) * log_probs


OBJECTIVES = {
    "own": {"loss_type": focal, "loss_normalization": "sequence"},
    "smoothed": {"label_smoothing": 0.2, "loss_normalization": "sequence", "normalize_constant": 7.0},
    "noise": {"neftune_noise_alpha": 5.0},
}
SPLITS = {
    "8 microbatches": {"gradient_accumulation_steps": 8},
    "padded, by tokens": {"layout": "padded", "max_tokens_per_microbatch": 70},
}


@pytest.fixture(scope="module")
def whole_steps(tmp_path_factory):
    """Every step in one piece, on one process; and a plain run to tell them from."""
    folder = tmp_path_factory.mktemp("whole")
    named = OBJECTIVES | {"plain": {}}
    return {name: train(folder / name, module=settings, dtype="float64") for name, settings in named.items()}


def assert_same(result, reference):
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(reference["losses"]), rtol=1e-5, atol=0)
    for kind in ("gradients", "weights"):
        for name, tensor in result[kind].items():
            torch.testing.assert_close(tensor, reference[kind][name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_pieces_is_the_step_in_one_piece(tmp_path, whole_steps, name):
    assert whole_steps[name]["losses"] != pytest.approx(whole_steps["plain"]["losses"], rel=1e-3)
    for split, data in SPLITS.items():
        assert_same(train(tmp_path / split, data=data, module=OBJECTIVES[name], dtype="float64"), whole_steps[name])


def train_all(folder, **options):
    for name, settings in OBJECTIVES.items():
        train(folder / name, module=settings, dtype="float64", **options)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path, whole_steps, strategy):
    data = {"max_tokens_per_microbatch": 60}
    processes = Processes(train_all, tmp_path, strategy=strategy, data=data, world_size=2)
    assert processes.wait(timeout=240) == [0, 0]
    for name in OBJECTIVES:
        assert_same(torch.load(tmp_path / name / "result.pt"), whole_steps[name])


def test_a_run_with_noise_continues_to_the_last_bit(tmp_path, whole_steps):
    train(tmp_path, module=OBJECTIVES["noise"], dtype="float64", callbacks=[StopAt(7)])
    continued = train(tmp_path, module=OBJECTIVES["noise"], dtype="float64")
    assert continued["losses"] == whole_steps["noise"]["losses"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "focal"}, "`loss_type` is 'focal', expected nll, dft or a function"),
        (
            {"loss_type": lambda x: -x.mean()},
            r"<lambda>`, which returns torch.float32 of shape \(\) for .* Expected is",
        ),
        ({"loss_type": lambda x: -x.double()}, r"which returns torch.float64 of shape \(5,\) for torch.float32"),
        ({"loss_type": lambda x: x.tolist()}, "which returns .* of type list"),
        ({"loss_type": lambda x: -x.detach()}, "which returns losses without a gradient"),
        (
            {"loss_type": lambda x: -x.numpy()},
            r"fails on \[-0.1, .*: Can't call numpy\(\) on Tensor that requires grad",
        ),
        ({"loss_type": lambda x: -(1 - x.exp()).log()}, "has losses .*inf.* and derivatives"),
        ({"loss_type": lambda x: -x * x.detach().softmax(0)}, "gives a token another loss, or .* beside others"),
        ({"loss_type": focal, "label_smoothing": 0.1}, "is 'test_objectives.focal' and .* cannot be combined"),
        ({"label_smoothing": 1.0}, "`label_smoothing` is 1.0, expected at least 0 and below 1"),
        ({"loss_type": "dft", "label_smoothing": 0.1}, "which cannot be combined"),
    ],
)
def test_what_is_no_loss_is_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        SFTModule("model", **settings)
