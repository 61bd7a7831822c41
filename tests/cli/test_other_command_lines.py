"""Command lines of a user's own, by Lightning's `LightningCLI`, with a module and a datamodule of the user's own."""

import json
import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from support.fits import ROWS
from support.models import save_tiny_model

from lightning_sft import SFTDataModule, SFTModule


class OwnModule(SFTModule):
    """Does not take `lr_scheduler`, and what it calls `seed` is something else."""

    def __init__(self, model: str, alpha: float = 0.1, seed: str = "none"):
        super().__init__(model, optimizer=lambda params: torch.optim.SGD(params, lr=alpha), lr_scheduler="constant")
        self.save_hyperparameters("alpha")


class OwnData(SFTDataModule):
    def __init__(self, tokenizer: str, num_rows: int = 22):
        super().__init__(tokenizer, ROWS[:num_rows], val_data=ROWS[:6], batch_size=8)


class CommandLine(LightningCLI):
    def add_arguments_to_parser(self, parser):
        within = ".init_args" if self.subclass_mode_model else ""
        parser.link_arguments(f"model{within}.model", f"data{within}.tokenizer")


@pytest.mark.parametrize("subclass_mode", [False, True])
def test_a_command_line_of_a_user_s_own_fits_continues_and_validates(tmp_path, monkeypatch, subclass_mode):
    monkeypatch.setattr(sys, "argv", ["own"])
    save_tiny_model(tmp_path / "model")
    saved = str(tmp_path / "saved.ckpt")

    def run(command, alpha, *arguments):
        module, data = {"model": str(tmp_path / "model"), "alpha": alpha}, {"num_rows": 16}
        if subclass_mode:
            module = {"class_path": f"{__name__}.OwnModule", "init_args": module}
            data = {"class_path": f"{__name__}.OwnData", "init_args": data}
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
        options |= {"enable_checkpointing": False, "enable_model_summary": False}
        (tmp_path / "own.yaml").write_text(json.dumps({"model": module, "data": data, "trainer": options}))
        return CommandLine(
            SFTModule if subclass_mode else OwnModule,
            SFTDataModule if subclass_mode else OwnData,
            subclass_mode_model=subclass_mode,
            subclass_mode_data=subclass_mode,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=False,
            args=[command, "--config", str(tmp_path / "own.yaml"), *arguments],
        ).trainer

    trainer = run("fit", 0.3, "--trainer.max_steps", "2")
    trainer.save_checkpoint(saved)
    weights = trainer.lightning_module.state_dict()
    again = run("fit", 0.2, "--trainer.max_steps", "4", "--ckpt_path", saved)  # not with the checkpoint's `alpha`
    assert again.global_step == 4
    assert [group["lr"] for group in again.optimizers[0].param_groups] == [0.2]
    assert run("validate", 0.2, "--ckpt_path", saved).callback_metrics["step"] == 2

    loaded = OwnModule.load_from_checkpoint(saved)
    assert loaded.hparams.alpha == 0.3
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
