"""On a GPU too a run does not depend on how it is split, stopped, or saved memory for."""

import pytest
import torch
from support.cuda import NEEDS_CUDA
from support.runs import StopAt, train

pytestmark = NEEDS_CUDA

CONFIG = {"hidden_size": 32, "num_attention_heads": 2}


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True)


def run(folder, module=None, **options):
    options = {"accelerator": "gpu", "max_steps": 6, "config": CONFIG} | options
    return train(folder, module={"optimizer": adamw} | (module or {}), **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The reference: float32, every step in one piece."""
    return run(tmp_path_factory.mktemp("plain"))


def assert_close(result, expected, rtol=1e-4):
    losses, reference = (torch.tensor(each["losses"]) for each in (result, expected))
    assert len(losses) == 6
    torch.testing.assert_close(losses, reference, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "data",
    [
        {"gradient_accumulation_steps": 8},
        {"max_tokens_per_microbatch": 70},
        {"layout": "padded", "max_tokens_per_microbatch": 70},
        {"num_workers": 1, "gradient_accumulation_steps": 3},
    ],
    ids=["8 microbatches", "by tokens", "padded, by tokens", "workers"],
)
def test_a_step_in_pieces_is_the_step_in_one_piece(tmp_path, plain, data):
    result = run(tmp_path, data=data)
    assert_close(result, plain)
    for name, gradient in result["gradients"].items():
        torch.testing.assert_close(gradient, plain["gradients"][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("offloading", [False, True])
def test_activations_that_are_computed_again_change_nothing(tmp_path, plain, offloading):
    module = {"gradient_checkpointing": True, "activation_offloading": offloading}
    assert_close(run(tmp_path, module), plain)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_blocks_take_packed_rows_in_half_precision(tmp_path, plain):
    assert_close(run(tmp_path, {"compile": True}, precision="bf16-mixed"), plain, rtol=1e-2)


def test_adapters_begin_and_learn_as_on_the_cpu(tmp_path):
    adapters = {"lora": {"r": 4}}
    assert_close(run(tmp_path / "gpu", adapters), run(tmp_path / "cpu", adapters, accelerator="cpu"))


def test_float16_learns_with_its_scale(tmp_path, plain):
    result = run(tmp_path, precision="16-mixed")
    assert result["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-2)
    assert result["losses"][-1] < 0.95 * result["losses"][0]


@pytest.fixture
def _deterministic():
    yield
    torch.use_deterministic_algorithms(False)  # Lightning leaves it on


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(("precision", "dropout"), [("32-true", 0.2), ("bf16-mixed", 0.0), ("16-mixed", 0.0)])
def test_a_run_that_is_stopped_goes_on_to_the_last_bit(tmp_path, precision, dropout):
    options = {"precision": precision, "deterministic": "warn", "generate": True, "every_n_steps": 2}
    options["config"] = CONFIG | {"attention_dropout": dropout}
    straight = run(tmp_path / "straight", **options)
    run(tmp_path / "parts", **options, callbacks=[StopAt(3)])
    torch.manual_seed(1)  # nothing of the process that was ended is left
    parts = run(tmp_path / "parts", **options)
    assert parts["losses"] == straight["losses"]
    torch.testing.assert_close(parts["weights"], straight["weights"], rtol=0, atol=0)
    files = list((tmp_path / "straight" / "generations").glob("*.jsonl"))
    assert len(files) > 1
    for file in files:
        assert (tmp_path / "parts" / "generations" / file.name).read_bytes() == file.read_bytes()
