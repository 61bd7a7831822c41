"""Memory that is kept from step to step, against that of real optimizers."""

import pytest
import torch
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_config, tiny_model

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.model.pretrained import build_empty_model
from lightning_sft.training.state_memory import state_memory

OPTIMIZERS = {
    "AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW": torch.optim.AdamW,
    "AMSGrad": lambda params: torch.optim.Adam(params, amsgrad=True),
    "SGD": torch.optim.SGD,
    "SGD with momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
}


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_step(name, dtype):
    model = tiny_model().to(dtype)
    model.model.embed_tokens.requires_grad_(False)
    optimizer = OPTIMIZERS[name](weight for weight in model.parameters() if weight.requires_grad)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    memory = state_memory(model.parameters(), OPTIMIZERS[name])
    assert memory.weights == nbytes(model.parameters())
    assert memory.gradients == nbytes(weight.grad for weight in model.parameters() if weight.grad is not None)
    assert memory.gradients < memory.weights
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert memory.optimizer == nbytes(states)


def test_an_optimizer_that_reads_values_is_said_to_be_unknown():
    memory = state_memory(build_empty_model(tiny_config(), {}).parameters(), torch.optim.Adafactor)
    assert memory.optimizer is None
    assert str(memory).startswith("weights and gradients: ")


def test_a_run_begins_by_saying_how_much_it_trains(tmp_path, caplog):
    data = SFTDataModule(character_tokenizer(), [{"prompt": "a", "output": "b"}])
    module = SFTModule(tiny_config(), lr_scheduler="constant")
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    count = 2 * 131 * 16 + 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    said = f"{count:,} parameters, all of them trained; weights, gradients and optimizer: {16 * count / 1024:.1f} KiB"
    assert said in caplog.text
