"""Training in 16 bits."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from support.cuda import CUDA, accelerator
from support.fits import fit
from support.models import tiny_config, tiny_model

from lightning_sft import SFTModule


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_bfloat16_runs_stay_close_to_float32(tmp_path, precision, dtype):
    losses = []
    for name in ("32-true", precision):
        module, recorder, _ = fit(tmp_path, precision=name, max_steps=3)
        losses.append(recorder.losses)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]
    assert module.model.lm_head.weight.dtype == dtype


def test_rotary_frequencies_stay_in_float32_under_bf16_true(tmp_path):
    module, _, _ = fit(tmp_path, precision="bf16-true", max_steps=1)
    buffers = {name: buffer for name, buffer in module.named_buffers() if "inv_freq" in name}
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    exact = tiny_model().model.rotary_emb.inv_freq
    assert torch.equal(buffers["model.model.rotary_emb.inv_freq"], exact)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer would unscale in its step, after the clipping
def test_scaled_gradients_are_clipped_after_unscaling_and_an_overflow_skips_the_schedule_too(tmp_path, fused, device):
    rates, norms = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(pl_module.lr_schedulers().get_last_lr()[0])
            gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]  # none after an overflow
            norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))

    class OneOverflow(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.model.lm_head.weight.register_hook(
                lambda grad: grad * math.inf if trainer.global_step == 1 else grad
            )

    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    module = SFTModule(
        tiny_config(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3, fused=fused),
        lr_scheduler="linear",
        warmup_steps=0,
        max_grad_norm=0.01,
    )
    fit(
        tmp_path,
        module,
        callbacks=[OneOverflow(), Watch()],
        plugins=[MixedPrecision("16-mixed", device, scaler)],
        accelerator=accelerator(device),
        max_steps=4,
    )
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert rates == pytest.approx([0.3 * share for share in (0.75, 0.75, 0.5, 0.25)])
