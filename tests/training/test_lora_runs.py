"""Runs that train adapters: what is saved, how they go on, and on how many processes."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from support.hub import FIRST, SECOND, CachedModel
from support.lora import LORA, build, disturb, logits
from support.processes import Processes
from support.runs import ROWS, StopAt, train
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from lightning_sft import HuggingFaceExport, SFTModule


def test_only_adapters_are_trained_and_saved_and_a_run_continues_to_the_last_bit(tmp_path):
    base = tmp_path / "base"
    build("tied").save_pretrained(base)
    options = {"module": {"model": str(base), "lora": LORA | {"lora_dropout": 0.1}}, "data": {"val_data": ROWS[:5]}}
    whole = train(tmp_path / "whole", **options, max_steps=6)
    train(tmp_path / "parts", **options, max_steps=6, callbacks=[StopAt(3)])
    parts = train(tmp_path / "parts", **options, max_steps=6)
    assert parts["losses"] == whole["losses"]
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, parts["weights"][name]), name
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, weight in whole["weights"].items():
        if ".lora_" not in name:
            assert torch.equal(weight, original[name.replace(".base_layer", "")]), name

    path = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"model.{name}" for name in whole["weights"] if ".lora_" in name}
    restored = SFTModule.load_from_checkpoint(path).model
    for name, weight in restored.named_parameters():
        assert torch.equal(weight, whole["weights"][name]), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("fsdp, one file", marks=pytest.mark.slow)])
def test_two_processes_train_the_same_adapters_and_the_folder_is_the_merged_model(tmp_path, strategy):
    base = tmp_path / "base"
    build("tied").save_pretrained(base)
    options = {"module": {"model": str(base), "lora": LORA}, "max_steps": 4}
    whole = train(tmp_path / "whole", **options, callbacks=[HuggingFaceExport()])
    two = tmp_path / "two"
    for steps in (2, 4):  # the second pair of processes continues
        more = {"strategy": strategy, "accelerator": "cpu", "callbacks": [HuggingFaceExport(), StopAt(steps)]}
        assert Processes(train, two, **options, **more, world_size=2).wait() == [0, 0]
    result = torch.load(two / "result.pt")
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, atol=1e-5, rtol=0)
    own, other = (AutoModelForCausalLM.from_pretrained(run / "huggingface") for run in (tmp_path / "whole", two))
    torch.testing.assert_close(logits(own), logits(other), atol=1e-5, rtol=0)
    restored = SFTModule.load_from_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt").model
    torch.testing.assert_close(logits(own), logits(restored), atol=1e-5, rtol=0)
    saved = two / "checkpoints" / "last.ckpt"
    if saved.is_dir():
        names = FileSystemReader(saved).read_metadata().state_dict_metadata
        names = {name.removeprefix("state_dict.") for name in names if name.startswith("state_dict.")}
    else:
        names = set(torch.load(saved, weights_only=True)["state_dict"])
    assert names == {f"model.{name}" for name in whole["weights"] if ".lora_" in name}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_an_average_of_adapters_goes_on_too(tmp_path):
    options = {"module": {"model": build("tied"), "lora": LORA}, "max_steps": 4}
    callbacks = [EMAWeightAveraging(use_buffers=False, decay=0.5)]
    train(tmp_path / "parts", **options, callbacks=[*callbacks, StopAt(2)])
    options["module"]["model"] = build("tied")
    parts = train(tmp_path / "parts", **options, callbacks=[EMAWeightAveraging(use_buffers=False, decay=0.5)])
    options["module"]["model"] = build("tied")
    whole = train(tmp_path / "whole", **options, callbacks=[EMAWeightAveraging(use_buffers=False, decay=0.5)])
    assert parts["losses"] == whole["losses"]
    assert all(torch.equal(weight, parts["weights"][name]) for name, weight in whole["weights"].items())


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    train(tmp_path, module={"model": build("tied"), "lora": LORA}, max_steps=1)
    for lora in (LORA | {"lora_alpha": 16}, None):
        with pytest.raises(
            ValueError, match=r"The checkpoint was trained with `lora` = .*'lora_alpha': 8.*, but it is"
        ):
            train(tmp_path, module={"model": build("tied"), "lora": lora}, max_steps=2)


def test_adapters_on_top_of_a_model_of_another_name_are_warned_of(tmp_path):
    for name in ("base", "instruct"):
        build("tied").save_pretrained(tmp_path / name)
    train(tmp_path, module={"model": str(tmp_path / "base"), "lora": LORA}, max_steps=1)
    train(tmp_path, module={"model": str(tmp_path / "base"), "lora": LORA}, max_steps=2)  # says nothing
    with pytest.warns(UserWarning, match=r"adapters are of the model '.*base', but `model` is '.*instruct' here"):
        train(tmp_path, module={"model": str(tmp_path / "instruct"), "lora": LORA}, max_steps=3)


def test_adapters_stay_with_the_commit_of_their_base_when_its_branch_moves_on(tmp_path, monkeypatch):
    hub = CachedModel(tmp_path / "hub", monkeypatch)
    first, second = build("tied"), disturb(build("tied"))
    hub.add(FIRST, first)
    hub.add(SECOND, second)
    hub.move("main", FIRST)
    options = {"module": {"model": "user/model", "lora": LORA}}
    train(tmp_path, **options, max_steps=1)
    hub.move("main", SECOND)
    restored = SFTModule.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt").model
    assert torch.equal(restored.lm_head.weight, first.lm_head.weight)
    train(tmp_path, module=options["module"] | {"model": f"user/model@{FIRST}"}, max_steps=2)  # says nothing
    with pytest.warns(UserWarning, match=f"of commit {FIRST} of 'user/model', but `model` is its commit {SECOND}"):
        train(tmp_path, **options, max_steps=3)
