"""Two processes begin a run as one does: with the weights of another run, and with layers that a callback freezes."""

import lightning as L
import pytest
import torch
from support.lora import LORA
from support.models import save_tiny_model
from support.processes import Processes
from support.runs import train

SHARDED = "fsdp"


class FreezeEmbeddings(L.Callback):
    """As a user would write it: the model is built when the first callback asks for it."""

    def setup(self, trainer, pl_module, stage):
        pl_module.configure_model()
        pl_module.model.get_input_embeddings().requires_grad_(False)


def same(result, expected):
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("strategy", ["ddp", SHARDED])
def test_what_a_callback_freezes_before_the_first_step_stays_as_it_was(tmp_path, strategy):
    save_tiny_model(tmp_path / "model")
    options = {"module": {"model": str(tmp_path / "model")}, "dtype": "float64", "max_steps": 3}
    callbacks = [FreezeEmbeddings()]
    whole = train(tmp_path / "whole", **options, callbacks=callbacks)
    two = Processes(train, tmp_path / "two", **options, callbacks=callbacks, strategy=strategy, world_size=2)
    assert two.wait() == [0, 0]
    result = torch.load(tmp_path / "two" / "result.pt")
    same(result, whole)
    before = train(tmp_path / "before", **options | {"max_steps": 0})["weights"]
    unchanged = {name for name, weight in before.items() if torch.equal(weight, result["weights"][name])}
    assert unchanged == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_sharded_run_begins_with_the_weights_of_a_file_or_of_a_sharded_run(tmp_path, lora):
    save_tiny_model(tmp_path / "model")
    options = {"module": {"model": str(tmp_path / "model"), "lora": lora}, "dtype": "float64"}
    train(tmp_path / "first", **options, max_steps=3)
    file = tmp_path / "first" / "checkpoints" / "last.ckpt"
    expected = train(tmp_path / "expected", **options, max_steps=2, init_from=file)
    assert expected["losses"] != train(tmp_path / "anew", **options, max_steps=2)["losses"]
    for name, steps, path in (("a file", 2, file), ("sharded", 3, None)):
        more = {"strategy": SHARDED, "init_from": path, "world_size": 2}
        assert Processes(train, tmp_path / name, **options, **more, max_steps=steps).wait() == [0, 0]
    same(torch.load(tmp_path / "a file" / "result.pt"), expected)
    folder = tmp_path / "sharded" / "checkpoints" / "last.ckpt"
    assert folder.is_dir()
    more = {"strategy": SHARDED, "init_from": folder, "world_size": 2}
    assert Processes(train, tmp_path / "of folder", **options, **more, max_steps=2).wait() == [0, 0]
    same(torch.load(tmp_path / "of folder" / "result.pt"), expected)
