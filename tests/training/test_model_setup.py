"""What happens to a model before the first optimizer step."""

import lightning as L
import pytest
import torch
from support.fits import fit
from support.models import tiny_config, tiny_model

from lightning_sft import SFTModule
from lightning_sft.errors import SettingsError
from lightning_sft.loops.trainer_state import leave_inference_mode


def test_a_sharded_model_is_not_evaluated_in_inference_mode(tmp_path):
    seen = []

    class Module(L.LightningModule):
        def validation_step(self, batch, batch_idx):
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    leave_inference_mode(trainer)
    trainer.validate(Module(), [0], verbose=False)
    assert seen == [(False, False)]


def test_a_model_of_which_nothing_is_trained_is_refused_at_once(tmp_path):
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(SettingsError, match="no weight that is to be trained"):
        fit(tmp_path, SFTModule(model))


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 4}}], ids=["whole", "adapters"])
def test_a_default_device_changes_nothing_of_what_is_found_out_about_a_model(settings):
    """Lightning makes the GPU the default device in `configure_model`; here it is one without any values."""
    module = SFTModule(tiny_config(), **settings)
    with torch.device("meta"):
        module.configure_model()
    assert module.why_not_packed is None
    assert module.num_positions == 64
    assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"cpu"}


def test_a_model_in_half_precision_is_trained_in_it_only_with_a_word_of_warning(tmp_path, recwarn):
    """As `AutoModelForCausalLM.from_pretrained` loads most models."""
    for options, module in (({"precision": "bf16-true"}, {}), ({}, {"lora": {"r": 2}})):
        fit(tmp_path, SFTModule(tiny_model().bfloat16(), **module), max_steps=1, **options)
    with pytest.warns(UserWarning, match=r"trained in torch.bfloat16, which rounds small steps away.* Load it with"):
        fit(tmp_path, SFTModule(tiny_model().bfloat16()), max_steps=1, precision="bf16-mixed")


def test_a_module_says_how_it_gets_its_model():
    module = SFTModule(tiny_config())
    assert not hasattr(module, "model")
    with pytest.raises(AttributeError, match=r"`SFTModule` has no `model` yet.* call `configure_model\(\)`"):
        module.model.generate()
    with pytest.raises(AttributeError, match="no attribute 'modle'"):
        module.modle.generate()
    module.configure_model()
    assert module.model.config.vocab_size == 131
