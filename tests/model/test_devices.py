"""What depends on the device: on the CPU, and on a GPU where there is one (`pytest -m gpu -n 0`)."""

import math

import pytest
import torch
from support.cuda import CUDA, accelerator
from support.models import tiny_config
from support.runs import read_log, train

from lightning_sft import SFTModule
from lightning_sft.model.checkpointing import ActivationCheckpointing
from lightning_sft.model.head import Head, score_labels
from lightning_sft.training.model_setup import prepare_model

CONFIG = {"hidden_size": 32, "num_attention_heads": 2}


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The reference: float32 on the CPU, every step in one piece."""
    return train(tmp_path_factory.mktemp("exact"), config=CONFIG, max_steps=10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=str)
@pytest.mark.parametrize("known", [True, False], ids=["known weights", "any gradient"])
def test_the_head_is_that_of_full_logits_in_float64(device, dtype, tolerance, known):
    generator = torch.Generator().manual_seed(0)
    shapes = ((700, 64), (5000, 64))  # rows and vocabulary: more than a tile of the CPU's
    inputs = [(0.3 * torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(5000, (700,), generator=generator).to(device)
    weights = torch.full((700,), 1 / 700, device=device)
    given = score_labels(inputs[0], Head(inputs[1]), labels, token_weights=weights if known else None)
    loss = given.loss if known else -(weights * given.log_probs).sum()

    precise = [tensor.detach().double().requires_grad_() for tensor in inputs]
    log_p = torch.log_softmax(precise[0] @ precise[1].t(), dim=-1)
    expected = -log_p.gather(-1, labels[:, None]).mean()
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(given.token_entropy.double(), entropy, rtol=tolerance, atol=tolerance)
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, precise), strict=True)
    assert all((ours.double() - theirs).norm() < tolerance * theirs.norm() for ours, theirs in pairs)


@pytest.mark.parametrize("tf32", ["highest", "high"])
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_a_gpu_s_shorter_float32_keeps_no_model_from_packing(model_type, tf32, device):
    config = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": model_type}
    module = SFTModule(tiny_config(**config, initializer_range=0.1))
    torch.set_float32_matmul_precision(tf32)
    try:
        module.configure_model()
        model = module.model.to(device)
        traits = prepare_model(model, None, module.builder, ActivationCheckpointing(), compiled=False)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert traits.why_not_packed is None


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 2e-3), ("bf16-true", 2e-2)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_run_learns_what_float32_on_the_cpu_does(tmp_path, device, exact, precision, tolerance, layout):
    """Half precision too, packed or padded, with generations in between."""
    options = {"accelerator": accelerator(device), "precision": precision, "max_steps": 10}
    data = {"layout": layout, "max_tokens_per_microbatch": 70}
    result = train(tmp_path, config=CONFIG, data=data, generate=True, **options)
    losses, expected = (torch.tensor(run["losses"]) for run in (result, exact))
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    assert expected[-1] < 0.8 * expected[0]
    rates = [line["train/learning_rate"] for line in read_log(tmp_path / "steps_0.jsonl")]
    cosine = [0.005 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx([0.0, 0.005, *cosine], rel=1e-9)  # two steps of warmup; not rounded to half precision
