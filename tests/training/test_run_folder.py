"""Where a run that a script starts keeps its files."""

from pathlib import Path

import pytest
import torch
from support.fits import make_data, make_trainer
from support.models import tiny_config

from lightning_sft import LastCheckpoint, SettingsError, SFTModule


def run(folder, max_steps, ckpt_path=None):
    trainer = make_trainer(folder, max_steps=max_steps, callbacks=[LastCheckpoint()], enable_checkpointing=True)
    trainer.fit(SFTModule(tiny_config()), make_data(), ckpt_path=ckpt_path)
    trainer.validate(trainer.model, make_data(val_data=[{"prompt": "a", "output": "b"}]), verbose=False)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # of the part that continues
def test_runs_without_a_logger_do_not_take_each_other_s_place_and_continue_in_their_own(tmp_path):
    def steps():
        return {
            str(path.parent.parent.relative_to(tmp_path)): torch.load(path)["global_step"]
            for path in tmp_path.rglob("last.ckpt")
        }

    run(tmp_path, 1)
    run(tmp_path, 2)
    run(tmp_path, 3)
    assert steps() == {".": 1, "version_0": 2, "version_1": 3}
    run(tmp_path, 4, tmp_path / "version_0" / "checkpoints" / "last.ckpt")
    run(tmp_path, 5, tmp_path / "checkpoints" / "last.ckpt")
    assert steps() == {".": 5, "version_0": 4, "version_1": 3}
    elsewhere = tmp_path / "elsewhere"
    run(elsewhere, 6, tmp_path / "checkpoints" / "last.ckpt")
    assert steps() == {".": 5, "version_0": 4, "version_1": 3, "elsewhere": 6}


@pytest.mark.parametrize("address", ["memory://bucket/runs", Path("memory://bucket/runs")])
def test_a_folder_at_an_address_is_refused_rather_than_taken_for_a_local_one(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=f"`trainer.default_root_dir` is '{address}', but nothing is written to"):
        run(address, 1)
    assert not list(tmp_path.iterdir())
