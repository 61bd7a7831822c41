"""Models from names, settings or models, with their adapters."""

import pytest
import torch
from peft import LoraConfig
from support.hub import FIRST, SECOND, CachedModel
from support.models import tiny_config, tiny_model

from lightning_sft import SettingsError, SFTModule
from lightning_sft.model.builder import ModelBuilder
from lightning_sft.model.lora import add_lora
from lightning_sft.model.pretrained import build_model
from lightning_sft.model.stored_adapters import tokenizer_beside


def test_models_are_made_in_main_memory_whatever_the_default_device(tmp_path):
    """Lightning makes the training device the default one, where other numbers would be drawn for the same seed."""
    tiny_model().save_pretrained(tmp_path)
    with torch.device("meta"):
        drawn, loaded = build_model(tiny_config(), {}, seed=1), build_model(str(tmp_path), {}, seed=1)
    lora = build_model(tiny_config(), {}, seed=1)
    with torch.device("meta"):
        add_lora(lora, {"r": 2})
    assert {weight.device.type for model in (drawn, loaded, lora) for weight in model.parameters()} == {"cpu"}
    torch.testing.assert_close(drawn.state_dict(), build_model(tiny_config(), {}, seed=1).state_dict())


def test_weights_from_a_configuration_follow_from_the_seed_and_disturb_no_other_randomness():
    def weights(seed):
        module = SFTModule(tiny_config(), seed=seed)
        before = torch.get_rng_state()
        module.configure_model()
        assert torch.equal(before, torch.get_rng_state())
        return module.model.lm_head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    module = SFTModule(str(tmp_path / "half"))
    module.configure_model()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_paths_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    builder = ModelBuilder("~/model")
    assert builder.source == str(tmp_path / "model") == tokenizer_beside("~/model")


def test_adapters_are_on_top_of_a_name_or_settings_and_of_nothing_if_a_model_has_no_name():
    assert ModelBuilder("some/model").base == "some/model"
    assert ModelBuilder(tiny_config()).base == tiny_config()
    model = tiny_model()
    assert ModelBuilder(model).base is None
    model.config._name_or_path = "its/name"
    assert ModelBuilder(type(model)(model.config)).base == "its/name"


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("given", [False, True])
def test_an_empty_model_has_the_shapes_and_types_of_the_model_and_no_values(lora, given):
    builder = ModelBuilder(tiny_model().bfloat16() if given else tiny_config(), lora=lora)
    empty = builder.build_empty()  # first, since a model that is given is adapted in place
    found = [[(name, w.shape, w.dtype) for name, w in each.named_parameters()] for each in (empty, builder.build())]
    assert found[0] == found[1]
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}


def test_a_model_without_values_is_that_which_the_arguments_name(tmp_path):
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "small")
    tiny_model().save_pretrained(tmp_path)
    for kwargs in ({"subfolder": "small"}, {"num_hidden_layers": 1}, {"dtype": "auto"}):
        builder = ModelBuilder(str(tmp_path), kwargs)
        assert builder.build_empty().num_parameters() == builder.build().num_parameters()


def test_arguments_that_a_model_which_is_there_would_not_heed_are_refused():
    with pytest.raises(SettingsError, match="`model_kwargs` has `attn_implementation`, but `model` is a model"):
        SFTModule(tiny_model(), model_kwargs={"attn_implementation": "eager"})


def test_a_name_may_have_a_revision(tmp_path, monkeypatch):
    hub, weights = CachedModel(tmp_path, monkeypatch), []
    for branch, commit in (("main", FIRST), ("feature/two", SECOND)):
        (tmp_path / "models--user--model" / "refs" / branch).parent.mkdir(exist_ok=True)
        hub.move(branch, commit)
        model = build_model(tiny_config(), {}, seed=len(weights))
        weights.append(model.lm_head.weight)
        hub.add(commit, model)
    for name, kwargs, expected in (
        ("user/model", None, 0),
        ("user/model@feature/two", None, 1),
        (f"user/model@{FIRST}", None, 0),
        ("user/model", {"revision": "feature/two"}, 1),
    ):
        builder = ModelBuilder(name, kwargs, lora={"r": 2})
        model = builder.build()
        assert torch.equal(model.lm_head.weight, weights[expected])
        stored = builder.arguments_for(model)
        assert (stored["model"], stored["model_kwargs"]["revision"]) == ("user/model", (FIRST, SECOND)[expected])


def test_two_revisions_are_refused():
    assert ModelBuilder("user/model@v1.0", {"revision": "v1.0"}).model_kwargs == {"revision": "v1.0"}
    with pytest.raises(SettingsError, match=r"'user/model@v1\.0', but `model_kwargs` has the `revision` 'main'"):
        ModelBuilder("user/model@v1.0", {"revision": "main"})


@pytest.mark.parametrize("name", ["user/model@v1.0", "user/model"])
def test_a_tokenizer_is_of_the_revision_of_its_model(name):
    assert tokenizer_beside(name, revision="v1.0") == "user/model@v1.0"


def test_a_path_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "other@2"):
        tiny_model().save_pretrained(folder)
    assert [ModelBuilder(name).source for name in ("other@2", "model@2", "./model@2")] == [
        "other@2",
        "model@2",
        "./model@2",
    ]
    assert tokenizer_beside("model", revision="v1.0") == "model"


def test_adapters_on_a_hub_are_refused_before_their_base_model_is_loaded(tmp_path, monkeypatch):
    hub = CachedModel(tmp_path, monkeypatch)
    hub.move("main", FIRST)
    hub.add(FIRST, LoraConfig(base_model_name_or_path="user/base"))
    for build in (SFTModule("user/model").configure_model, ModelBuilder("user/model").build_empty):
        with pytest.raises(SettingsError, match=r"^`model` is 'user/model', which holds adapters. Download them \(`hf"):
            build()
