"""Training never waits for the device, but for the guard's copy of the numbers of the step before.

Neither within a step nor between two, where Lightning reads what progress bars show.
"""

import warnings

import lightning as L
import pytest
import torch
from support.cuda import NEEDS_CUDA, attend_as_the_kernel
from support.device_reads import DeviceReadError, NoDeviceReads
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_config
from support.processes import Processes
from support.runs import ROWS, adamw, train
from torch import Tensor
from transformers import masking_utils

from lightning_sft import SFTDataModule, SFTModule, StepProgressBar, TokenThroughput
from lightning_sft.model import attention, head
from lightning_sft.training.host_copy import HostCopy


class OnDevice(L.Callback):
    """From the second optimizer step on, model, optimizer and batch are on a device that must not be read."""

    def __init__(self, device: "NoDeviceReads | NoWaits") -> None:
        self.device, self.num_steps, self.is_inside = device, 0, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.leave()
        if batch_idx:
            self.device.put([*pl_module.parameters(), *pl_module.buffers()])
            moments = [moment for state in trainer.optimizers[0].state.values() for moment in state.values()]
            self.device.put([moment for moment in moments if moment.ndim])  # AdamW counts its steps on the host
            self.device.put([vars(microbatch) for microbatch in batch.microbatches])
            self.device.__enter__()
            self.is_inside = True

    def leave(self):
        self.num_steps += self.is_inside
        if self.is_inside:
            self.device.__exit__(None, None, None)
        self.is_inside = False

    def on_train_epoch_end(self, trainer, pl_module):
        self.leave()

    def on_exception(self, trainer, pl_module, exception):
        self.leave()


@pytest.fixture
def device(monkeypatch):
    device = NoDeviceReads()

    def copy(self: HostCopy, tensor: Tensor) -> None:
        self._copy, self._copied = device.copy_to_host(tensor), None

    monkeypatch.setattr(HostCopy, "__init__", copy)
    # What reads on the CPU alone does here what it does on a device.
    monkeypatch.setattr(attention, "_attend_each", attend_as_the_kernel)
    monkeypatch.setattr(head, "times", lambda gradient, factor: None if gradient is None else gradient.mul_(factor))
    return device


class NoWaits:
    """Within it torch refuses to wait for a CUDA device, but for its events, by which the guard reads its numbers."""

    def put(self, tensors):
        """They are there."""

    def __enter__(self):
        with warnings.catch_warnings(action="ignore"):  # that it does not see every wait
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")


def run(device, data, config, accelerator="cpu", **module):
    on_device = OnDevice(device)
    callbacks = [on_device, TokenThroughput(), StepProgressBar()]
    options = {"accelerator": accelerator, "precision": module.pop("precision", "32-true")}
    trainer = make_trainer(".", max_steps=4, callbacks=callbacks, enable_progress_bar=True, **options)
    rows = SFTDataModule(character_tokenizer(), ROWS, batch_size=8, **data)
    trainer.fit(SFTModule(tiny_config(**config), optimizer=adamw, **module), rows)
    return on_device.num_steps


MIXTURE = {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "output_router_logits": True,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
}
SETTINGS = {
    "packed": ({"max_tokens_per_microbatch": 70}, {}, {}),
    "padded": ({"layout": "padded", "gradient_accumulation_steps": 3}, {}, {}),
    "half precision": ({}, {}, {"precision": "bf16-mixed"}),
    "by sequence": ({}, {}, {"loss_normalization": "sequence", "normalize_constant": 100.0}),
    "smoothed": ({}, {}, {"label_smoothing": 0.1, "neftune_noise_alpha": 5.0, "gradient_checkpointing": True}),
    "a mixture of experts": ({}, MIXTURE, {}),
    "dft with adapters": ({}, {}, {"loss_type": "dft", "lora": {"r": 4, "lora_dropout": 0.1}}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizer_step_does_not_read_the_device(device, name, monkeypatch):
    data, config, module = SETTINGS[name]
    leave_out_known_reads(data, monkeypatch)
    assert run(device, data, config, **module) == 3


def leave_out_known_reads(data, monkeypatch):
    if data.get("layout") == "padded":  # `transformers` asks, once in a microbatch, whether padded rows are packed
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS_CUDA) for name in SETTINGS])
def test_an_optimizer_step_does_not_wait_for_a_gpu(name, monkeypatch):
    data, config, module = SETTINGS[name]
    leave_out_known_reads(data, monkeypatch)
    # Autocast does not reach the experts, and products of groups in float32 ask the device how large the groups are.
    precision = "bf16-true" if config == MIXTURE else "bf16-mixed"
    assert run(NoWaits(), data, config, "gpu", **(module | {"precision": precision})) == 3


def test_a_step_that_reads_the_device_would_be_seen(device):
    with pytest.raises(DeviceReadError, match="cpu"):
        run(device, {}, {}, nonfinite="skip")


class CountBroadcasts(L.Callback):
    """Writes down how often a process has told others something between its first step and its last."""

    def __init__(self, path):
        self.path, self.num_broadcasts = path, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            broadcast = torch.distributed.broadcast

            def counted(*args, **kwargs):
                self.num_broadcasts += 1
                return broadcast(*args, **kwargs)

            torch.distributed.broadcast = counted
        self.path.write_text(f"{trainer.global_step} steps, {self.num_broadcasts} broadcasts")


def test_several_devices_do_not_ask_each_other_for_signals_before_each_step(tmp_path):
    """Lightning would, and wait for the device with it; `LastCheckpoint` asks for those of the step before."""
    options = {"max_steps": 4, "strategy": "ddp", "world_size": 2}
    counting = Processes(train, tmp_path, callbacks=[CountBroadcasts(tmp_path / "count")], **options)
    assert counting.wait() == [0, 0]
    assert (tmp_path / "count").read_text() == "4 steps, 0 broadcasts"
