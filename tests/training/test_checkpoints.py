"""What a checkpoint of a run holds, and what can be done with it."""

import pickle

import pytest
import torch
from support.fits import fit, sgd
from support.models import tiny_config, tiny_model

from lightning_sft import SFTModule
from lightning_sft.errors import SettingsError, SettingsTypeError
from lightning_sft.training.checkpoint_files import AtomicCheckpointIO, put_folder_behind_link


def test_a_checkpoint_loads_without_the_original_weights(tmp_path):
    source = tmp_path / "pretrained"
    tiny_model().save_pretrained(source)
    module, _, trainer = fit(tmp_path, SFTModule(str(source), optimizer=sgd, max_grad_norm=0.25), max_steps=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    for file in source.iterdir():
        file.unlink()
    loaded = SFTModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.hparams.max_grad_norm == 0.25
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, module(ids).logits)


def focal(log_probs):
    return -((1 - log_probs.exp()) ** 2) * log_probs


def test_a_checkpoint_holds_the_name_of_a_loss_of_one_s_own_and_runs_no_code_of_that_name(tmp_path):
    module = pickle.loads(pickle.dumps(SFTModule(tiny_model(), loss_type=focal)))
    path = tmp_path / "one.ckpt"
    fit(tmp_path, module, max_steps=1)[2].save_checkpoint(path, weights_only=False)
    with pytest.raises(SettingsError, match=r"'test_checkpoints.focal', .* give it to `load_from_checkpoint`"):
        SFTModule.load_from_checkpoint(path, weights_only=True)
    loaded = SFTModule.load_from_checkpoint(path, weights_only=True, loss_type=focal)
    fit(tmp_path, loaded, ckpt_path=path, max_steps=2)
    with pytest.raises(SettingsError, match=r"made with `loss_type` = test_checkpoints.focal, now it is nll"):
        fit(tmp_path, SFTModule(tiny_config()), ckpt_path=path, max_steps=2)


def test_an_argument_that_no_module_has_is_refused_when_one_is_loaded(tmp_path):
    """Lightning leaves it out in silence."""
    with pytest.raises(SettingsTypeError, match=r"given `learning_rte`, no argument of `SFTModule`.* `seed`\."):
        SFTModule.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu", learning_rte=1e-3)


def test_a_module_with_the_default_optimizer_can_be_pickled():
    """As Lightning does to give it to processes that it starts (`ddp_spawn`)."""
    module = SFTModule(tiny_model())
    copy = pickle.loads(pickle.dumps(module))
    assert torch.equal(copy.model.lm_head.weight, module.model.lm_head.weight)
    assert isinstance(copy.optimizer_factory(copy.parameters()), torch.optim.AdamW)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_weights_can_be_given_to_a_module_that_has_no_model_yet(lora):
    """As Lightning gives those of processes that it has started, of which the module itself knows nothing."""
    trained, started_from = (SFTModule(tiny_config(), lora=lora) for _ in range(2))
    trained.configure_model()
    for weight in trained.parameters():
        weight.data += 0.1 * weight.requires_grad
    started_from.load_state_dict(trained.state_dict(), strict=False)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(started_from(ids).logits, trained(ids).logits)


def test_a_step_that_is_saved_again_takes_the_place_of_its_earlier_folder(tmp_path):
    """A run that goes back to an earlier checkpoint comes to the same step with other weights."""
    link = tmp_path / "last.ckpt"
    for step, content in ((1, "a"), (2, "b"), (2, "c"), (2, "d"), (3, "e")):
        (partial := tmp_path / ".partial").mkdir()
        (partial / "meta.pt").write_text(content)
        put_folder_behind_link(partial, tmp_path / f"step_{step}", link)
        assert (link / "meta.pt").read_text() == content
        assert len([path for path in tmp_path.iterdir() if not path.is_symlink()]) == 1


def test_a_checkpoint_at_an_address_is_written_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, "memory://bucket/checkpoints/best.ckpt")
    assert not list(tmp_path.iterdir())
    loaded = AtomicCheckpointIO().load_checkpoint("memory://bucket/checkpoints/best.ckpt", weights_only=True)
    assert loaded == {"global_step": 3}
