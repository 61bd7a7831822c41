"""Models that cannot be loaded or built, and code of theirs that is not run."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from support.models import save_tiny_model, tiny_config
from support.refusals import Provoke, Refusal, each, module, write
from support.untrusted import Payload, own_code, trace_of_payload
from transformers import LlamaForCausalLM

from lightning_sft import SFTModule

LLAMA = "{'model_type': 'llama', ..., which cannot be built: "


def model_folder(*gone: str, **files: str | bytes | dict) -> Provoke:
    """A module over a model's folder with other files; a dictionary changes a JSON file."""

    def provoke(folder: Path) -> None:
        folder /= "model"
        save_tiny_model(folder)
        for name in gone:
            (folder / name).unlink()
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            if isinstance(content, dict):
                content = json.dumps(json.loads(path.read_text()) | content)
            write(path, content)
        SFTModule(str(folder)).configure_model()

    return provoke


def cut_short(name: str) -> Provoke:
    """A module over a model's folder where one file lacks its end."""

    def provoke(folder: Path) -> None:
        save_tiny_model(folder / "model")
        write(folder / "model" / name, (folder / "model" / name).read_bytes()[:-9])
        SFTModule(str(folder / "model")).configure_model()

    return provoke


MODELS = {
    "missing model": Refusal(
        module("{tmp}/none"), "`model` is '{tmp}/none', which cannot be loaded: there is no such folder."
    ),
    "settings without a type": Refusal(
        module({"hidden_size": 8}),
        "`model` is to be built from {'hidden_size': 8}, whose `model_type` None is not an architecture that this "
        "version of `transformers` knows. Give one, such as qwen2 or llama; or the name or folder of a model that "
        "brings code of its own.",
    ),
    "settings that contradict each other": Refusal(
        module(tiny_config(hidden_size=15)),
        "`model` is " + LLAMA + "...The hidden size (15) is not a multiple of the number of attention heads (2).",
    ),
    "settings of text": Refusal(
        module(tiny_config(hidden_size="16")),
        "`model` is " + LLAMA + "...Field 'hidden_size' expected int, got str (value: '16')",
    ),
    "settings of a model that reads both ways": Refusal(
        module({"model_type": "t5"}),
        "`model` is {'model_type': 't5'}, which cannot be built: Unrecognized configuration class ...",
    ),
    "unknown attention": Refusal(
        module(tiny_config(), model_kwargs={"attn_implementation": "flush"}),
        "`model` is " + LLAMA + 'Specified `attn_implementation="flush"` is not supported....',
    ),
    "unknown argument of the model": Refusal(
        module(tiny_config(), model_kwargs={"nonsense": 1}),
        "`model` is " + LLAMA + "TypeError: ... got an unexpected keyword argument 'nonsense'",
    ),
    "folder without config": Refusal(
        model_folder("config.json"), "`model` is '{tmp}/model', which cannot be loaded: ..."
    ),
    "folder with a truncated config": Refusal(
        model_folder(config__json='{"model_type": "lla'),
        "`model` is '{tmp}/model', which cannot be loaded: ...config.json' is not a valid JSON file.",
    ),
    "folder without weights": Refusal(
        model_folder("model.safetensors"),
        "`model` is '{tmp}/model', which cannot be loaded: Error no file named model.safetensors...",
    ),
    "folder with empty weights": Refusal(
        model_folder(model__safetensors=b""),
        "`model` is '{tmp}/model', which cannot be loaded: SafetensorError: ...header...",
    ),
    "folder with truncated weights": Refusal(
        cut_short("model.safetensors"), "`model` is '{tmp}/model', which cannot be loaded: SafetensorError: ..."
    ),
    "folder with weights of other shapes": Refusal(
        model_folder(config__json={"hidden_size": 8}),
        "`model` is '{tmp}/model', whose weights have `lm_head.weight` as (131, 16) instead of (131, 8), and 20 "
        "more: they are not those of its config.json. To train such a model anyway, load it yourself and pass it as "
        "`model`.",
    ),
    "folder with a layer too few": Refusal(
        model_folder(config__json={"num_hidden_layers": 3}),
        "`model` is '{tmp}/model', whose weights lack `model.layers.2.input_layernorm.weight`, and 8 more: they are "
        "not those of its config.json. To train such a model anyway, load it yourself and pass it as `model`.",
    ),
}


@each(MODELS)
def test_a_model_that_cannot_be_had_is_refused_with_the_reason(refusal, tmp_path):
    refusal.check(tmp_path)


@pytest.fixture
def trace(tmp_path):
    return trace_of_payload(tmp_path)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_weights_that_hold_code_are_not_loaded(tmp_path, trace, kind):
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    path = tmp_path / "model" / "pytorch_model.bin"
    weights = {"a": Payload(trace)}
    path.write_bytes(pickle.dumps(weights, protocol=2)) if kind == "pickle" else torch.save(weights, path)
    with pytest.raises(ValueError, match=r"its weights are a pickle that holds .*, which could run code\. Ask"):
        SFTModule(str(tmp_path / "model")).configure_model()
    assert not trace.exists()


def test_code_of_a_model_runs_only_if_the_user_says_so(tmp_path, trace):
    for name, content in own_code(trace).items():
        write(tmp_path / "own" / name, content)
    with pytest.raises(ValueError, match=re.escape("`model_kwargs` has `trust_remote_code: true`. Read that code")):
        SFTModule(str(tmp_path / "own")).configure_model()
    assert not trace.exists()
    with pytest.raises(ValueError, match="cannot be loaded"):  # there are no weights, but now the code is read
        SFTModule(str(tmp_path / "own"), model_kwargs={"trust_remote_code": True}).configure_model()
    assert trace.exists()


def test_code_beside_a_known_model_is_not_run(tmp_path, trace):
    save_tiny_model(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    for name, content in own_code(trace, **config).items():
        if name != "tokenizer_config.json":
            write(tmp_path / "own" / name, content)
    module = SFTModule(str(tmp_path / "own"))
    module.configure_model()
    assert type(module.model) is LlamaForCausalLM
    assert not trace.exists()
