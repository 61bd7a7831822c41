"""Settings for those who have little memory: what they keep, and that they change nothing else."""

from functools import partial

import pytest
import torch
from support.architectures import tiny_architecture
from support.fits import fit, make_data, sgd
from support.models import tiny_config, tiny_model
from support.refusals import Refusal, each
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_sft import LastCheckpoint, SFTModule
from lightning_sft.errors import SettingsTypeError
from lightning_sft.model.checkpointing import ActivationCheckpointing

LAYERS = 5


def losses_and_calls(folder, **settings):
    """Of a run, and how often each block has run with gradients in its three steps."""
    torch.manual_seed(5)
    module, calls = SFTModule(tiny_model(num_hidden_layers=LAYERS), optimizer=sgd, **settings), [0] * LAYERS

    def count(index):
        calls[index] += torch.is_grad_enabled()  # not while it is tried out

    for index, block in enumerate(module.model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: count(index))
    return fit(folder, module, max_steps=3)[1].losses, calls


@pytest.mark.parametrize(
    ("setting", "calls"), [(True, [6] * 5), (1, [6] * 5), (2, [6, 3, 6, 3, 6]), (4, [6, 3, 3, 3, 6])]
)
def test_every_nth_block_computes_again_and_nothing_changes(tmp_path, setting, calls):
    plain, once = losses_and_calls(tmp_path)
    assert once == [3] * LAYERS
    losses, counted = losses_and_calls(tmp_path, gradient_checkpointing=setting)
    assert counted == calls
    assert losses == pytest.approx(plain, rel=1e-6)


def test_blocks_of_text_and_of_images_are_counted_apart():
    model = tiny_architecture("got_ocr2")
    ActivationCheckpointing(100).enable(model)
    blocks = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    assert [block.gradient_checkpointing for block in blocks] == [True, False, True, False]


def test_offloading_keeps_the_inputs_of_the_blocks_in_main_memory(monkeypatch):
    model, packed = tiny_model(num_hidden_layers=LAYERS).train(), []

    class Watched(torch.autograd.graph.saved_tensors_hooks):
        """In the place of torch's own, which needs a GPU."""

        def __init__(self, pin_memory=False, device_type="cuda"):
            assert pin_memory
            super().__init__(lambda tensor: packed.append(tensor) or tensor.clone(), lambda tensor: tensor)

    def gradients():
        model.zero_grad()
        model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        return [weight.grad for weight in model.parameters()]

    plain = gradients()
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Watched)
    ActivationCheckpointing(True, activation_offloading=True).enable(model)
    torch.testing.assert_close(gradients(), plain)
    hidden = [tensor for tensor in packed if tensor.ndim == 3 and tensor.shape[-1] == 16]
    assert len(hidden) == LAYERS
    assert not any(isinstance(tensor, torch.nn.Parameter) for tensor in packed)


def test_on_a_cpu_there_is_nothing_to_offload(tmp_path):
    plain, _ = losses_and_calls(tmp_path)
    losses, calls = losses_and_calls(tmp_path, gradient_checkpointing=True, activation_offloading=True)
    assert losses == pytest.approx(plain, rel=1e-6)
    assert calls == [6] * LAYERS


def eight_bit(params, lr=0.01):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(params, lr=lr, weight_decay=0.1, betas=(0.9, 0.999))


def test_an_eight_bit_optimizer_trains_like_adamw_and_continues_to_the_last_bit(tmp_path):
    def run(folder, optimizer, max_steps, ckpt_path=None):
        config = tiny_config(hidden_size=64, intermediate_size=128)  # smaller weights keep their states in float32
        module, last = SFTModule(config, optimizer=optimizer, lr_scheduler="constant"), LastCheckpoint()
        options = {"callbacks": [last], "max_steps": max_steps, "ckpt_path": ckpt_path, "enable_checkpointing": True}
        return fit(folder, module, make_data(), **options)

    module, whole, trainer = run(tmp_path / "whole", eight_bit, 6)
    states = trainer.optimizers[0].state.values()
    assert any(state["state1"].dtype == torch.uint8 for state in states)
    run(tmp_path / "parts", eight_bit, 3)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    continued, rest, _ = run(tmp_path / "parts", eight_bit, 6, last)
    assert rest.losses == whole.losses[3:]
    no_longer, _, _ = run(tmp_path / "parts", partial(eight_bit, lr=0.0), 7, last)
    for one, *others in zip(*(which.parameters() for which in (module, continued, no_longer)), strict=True):
        assert all(torch.equal(one, other) for other in others)
    full = run(tmp_path / "full", lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1), 6)[1]
    assert whole.losses == pytest.approx(full.losses, rel=0.01)
    assert whole.losses != full.losses


REFUSALS = {
    "a number below 1": Refusal(
        lambda folder: SFTModule(tiny_config(), gradient_checkpointing=0),
        "`gradient_checkpointing` is 0, expected true, false, or a number from 1 for every n-th block.",
    ),
    "offloading of nothing": Refusal(
        lambda folder: SFTModule(tiny_config(), activation_offloading=True),
        "`activation_offloading` keeps the inputs of blocks under `gradient_checkpointing` in CPU memory, but that "
        "is false. Set it to true as well.",
    ),
    "a word": Refusal(
        lambda folder: SFTModule(tiny_config(), gradient_checkpointing="yes"),
        "`gradient_checkpointing` is 'yes' of type str, expected a number, or true or false.",
        SettingsTypeError,
    ),
}


@each(REFUSALS)
def test_what_cannot_save_memory_is_refused_by_name(refusal, tmp_path):
    refusal.check(tmp_path)
