"""What happens to a model before the first optimizer step."""

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.fits import fit
from support.models import tiny_model
from transformers import AutoModelForCausalLM

from lightning_sft import SFTModule
from lightning_sft.errors import SettingsError
from lightning_sft.trainer_loops import leave_inference_mode


def test_a_sharded_model_is_not_evaluated_in_inference_mode(tmp_path):
    seen = []

    class Module(L.LightningModule):
        def validation_step(self, batch, batch_idx):
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    leave_inference_mode(trainer)
    trainer.validate(Module(), [0], verbose=False)
    assert seen == [(False, False)]


def test_what_does_not_run_on_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setattr("lightning_sft.training.model_setup.is_sharded", lambda module: True)
    with pytest.raises(ValueError, match="`compile` is true, but the model is sharded"):
        SFTModule(tiny_model(), compile=True).configure_model()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by `peft` itself
@pytest.mark.parametrize("given", ["a folder of peft", "a model with adapters", "a frozen model"])
def test_a_model_that_could_not_be_trained_or_loaded_again_is_refused_at_once(tmp_path, given):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model: object = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if given == "a frozen model":
        model.requires_grad_(False)
    else:
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.save_pretrained(tmp_path / "adapter")
        model = adapted.base_model.model if given == "a model with adapters" else str(tmp_path / "adapter")
    expected = "no weight that is to be trained" if given == "a frozen model" else "has adapters by `peft` already"
    with pytest.raises(SettingsError, match=expected):
        fit(tmp_path, SFTModule(model))
