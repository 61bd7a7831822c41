"""Adapters that `peft` has written to a folder, or put into a model, as what a run begins with."""

import json
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.lora import IDS, LORA, build, disturb, logits
from transformers import AutoModelForCausalLM

from lightning_sft import SettingsError, SFTModule
from lightning_sft.model.builder import ModelBuilder
from lightning_sft.model.precision import Precision

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),  # by peft
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # by peft
]
KINDS = {
    "plain": ("untied", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "DoRA, rank-stabilised": ("tied", {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "use_rslora": True}),
    "trained head": ("untied", {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    "trained and tied embeddings": (
        "tied",
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "biases": ("tied", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "patterns": (
        "untied",
        {"target_modules": ".*_proj", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    ),
    "some layers": ("untied", {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]}),
    "embeddings": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}),
}


def write(folder, name="untied", config=None, dtype=torch.float32, **settings):
    """A base model and adapters that do something, both as users have them; `model` is adapted in memory."""
    base = build(name, dtype)
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    config = config or LoraConfig(**(LORA | {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = disturb(get_peft_model(base, config))
        model.save_pretrained(folder / "adapters")
    return model


def naive(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / "adapters", is_trainable=True).train()


def loss_and_gradients(model):
    torch.manual_seed(1)  # of dropout
    loss = (model(IDS).logits.float().logsumexp(-1) ** 2).mean()
    loss.backward()
    named = [(name.removeprefix("base_model.model."), weight) for name, weight in model.named_parameters()]
    return loss, {name: weight.grad for name, weight in named if weight.requires_grad}


@pytest.mark.parametrize("form", ["as the model", "beside its model"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_from_a_folder_are_trained_as_by_peft(tmp_path, kind, form):
    name, settings = KINDS[kind]
    write(tmp_path, name, **settings)
    folder = tmp_path / "adapters"
    builder = (
        ModelBuilder(folder) if form == "as the model" else ModelBuilder(tmp_path / "base", lora={"path": str(folder)})
    )
    model = builder.build().train()
    (loss, gradients), (expected_loss, expected) = map(loss_and_gradients, (model, naive(tmp_path)))
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[each], expected[each]) for each in expected)
    assert not torch.allclose(logits(model), logits(build(name)), atol=0.001)
    empty = ModelBuilder(folder).build_empty()
    assert [(each, w.shape) for each, w in empty.named_parameters()] == [
        (k, w.shape) for k, w in model.named_parameters()
    ]


def test_stored_in_half_precision_they_are_trained_in_float32_beside_a_base_as_it_is_stored(tmp_path):
    write(tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    half = {name: weight.bfloat16() for name, weight in load_file(path).items()}
    save_file(half, path)
    model = ModelBuilder(str(tmp_path / "adapters")).build(Precision.of("bf16-mixed"))
    kinds = {weight.requires_grad: weight.dtype for weight in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    weights = dict(model.named_parameters())
    for name, weight in half.items():
        own = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(weights[own], weight.float())


def test_what_is_given_beside_the_path_takes_effect_or_is_refused(tmp_path):
    write(tmp_path, target_modules=["v_proj", "q_proj"])
    base, path = str(tmp_path / "base"), str(tmp_path / "adapters")
    model = ModelBuilder(base, lora={"path": path, "r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5})
    layer = model.build().model.layers[0].self_attn.q_proj
    assert layer.lora_dropout["default"].p == 0.5
    for name, value in {"r": 8, "lora_alpha": 4, "use_dora": True, "target_modules": ["q_proj"]}.items():
        for source, lora in ((base, {"path": path, name: value}), (path, {name: value})):
            with pytest.raises(
                SettingsError, match=rf"`lora\.{name}` is .*, but the adapters in .* stored with .*Leave"
            ):
                ModelBuilder(source, lora=lora)
    with pytest.raises(SettingsError, match="`lora` has `rank`, which cannot be set"):
        ModelBuilder(base, lora={"path": path, "rank": 4})


def rewrite(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


REFUSED_CONFIGURATIONS = [
    ({"peft_type": "IA3"}, "has `peft_type` IA3, but only adapters of LoRA"),
    ({"task_type": "SEQ_CLS"}, "has `task_type` SEQ_CLS, but only causal"),
    ({"base_model_name_or_path": None}, "do not name their base model. Give it as `model`, and the .* `lora.path`"),
    ({"base_model_name_or_path": "/nowhere"}, "were trained on top of '/nowhere', which is not there. Give it"),
    ({"init_lora_weights": "pissa"}, "has `init_lora_weights` 'pissa', which has changed the base model's"),
    ({"trainable_token_indices": [1]}, "which would train, but could not be merged"),
    ({"alora_invocation_tokens": [1]}, "`lora` has `alora_invocation_tokens`, which cannot be set"),
    ({"layers_of_tomorrow": 3}, "has `layers_of_tomorrow`, which this version of `peft` does not know"),
    ({"r": 0}, "`lora.r` is 0, expected at least 1"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED_CONFIGURATIONS, ids=lambda each: str(each)[:30])
def test_a_configuration_that_cannot_be_trained_is_refused_at_once(tmp_path, values, message):
    write(tmp_path)
    rewrite(tmp_path / "adapters", **values)
    with pytest.raises(SettingsError, match=message):
        SFTModule(str(tmp_path / "adapters"))


@pytest.mark.parametrize("kind", [IA3Config, PromptTuningConfig])
def test_adapters_of_another_kind_are_refused_at_once(tmp_path, kind):
    options = (
        {"num_virtual_tokens": 2}
        if kind is PromptTuningConfig
        else {"target_modules": ["q_proj"], "feedforward_modules": []}
    )
    model = write(tmp_path, config=kind(task_type="CAUSAL_LM", **options))
    for settings in ({"model": str(tmp_path / "adapters")}, {"model": model}):
        with pytest.raises(SettingsError, match=r"`peft_type` .*, but only adapters of LoRA are trained here"):
            SFTModule(**settings)


def test_what_is_no_folder_of_adapters_is_refused_at_once(tmp_path):
    write(tmp_path)
    base, folder = str(tmp_path / "base"), tmp_path / "adapters"
    for path, message in (
        (str(tmp_path / "missing"), "which is not a folder. .*`hf download NAME"),
        (base, "which has no adapter_config.json: it holds no adapters"),
        (3, "`lora.path` is 3 of type int, expected a folder"),
    ):
        with pytest.raises(SettingsError, match=message):
            SFTModule(base, lora={"path": path})
    with pytest.raises(SettingsError, match=r"`model` is '.*adapters', a folder of adapters, and `lora.path` is"):
        SFTModule(str(folder), lora={"path": str(folder)})
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"whose adapter_config\.json is no JSON"):
        SFTModule(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="holds adapters and a whole model"):
        SFTModule(str(folder))
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"has adapter_config\.json, but no adapter_model\.safetensors"):
        SFTModule(str(folder))


def test_weights_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path):
    write(tmp_path)
    path = tmp_path / "adapters" / "adapter_model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    embeddings = "base_model.model.model.embed_tokens.weight"
    stored_embeddings = build("untied").model.embed_tokens.weight.detach()
    for stored, message in (
        ({name: weights[name] for name in weights if name != first}, r"do not fit Llama.*is missing in the folder"),
        (
            weights | {"base_model.model.other.lora_A.weight": torch.ones(1)},
            r"other.lora_A.* exists only in the folder",
        ),
        (weights | {first: torch.ones(7, 64)}, r"do not fit LlamaForCausalLM: size mismatch for .*\[7, 64\]"),
        (
            weights | {embeddings: stored_embeddings + 1},
            r"also hold weights of their base model, and these differ .*embed_tokens",
        ),
    ):
        save_file(stored, path)
        with pytest.raises(SettingsError, match=message):
            SFTModule(str(tmp_path / "adapters")).configure_model()
    save_file(weights | {embeddings: stored_embeddings}, path)  # as the base has them: peft stores them if in doubt
    SFTModule(str(tmp_path / "adapters")).configure_model()
    path.write_bytes(b"no weights")
    with pytest.raises(SettingsError, match="cannot be read"):
        SFTModule(str(tmp_path / "adapters")).configure_model()


def test_embeddings_that_the_adapters_have_untied_from_the_head_are_refused(tmp_path):
    write(tmp_path, "tied", modules_to_save=["embed_tokens"])
    with pytest.raises(SettingsError, match="which share their weights, would be trained apart"):
        SFTModule(str(tmp_path / "adapters")).configure_model()


# -- models that have adapters already ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["wrapped", "injected"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_adapters_by_peft_is_taken_as_it_is(tmp_path, kind, form):
    name, settings = KINDS[kind]
    wrapped = write(tmp_path, name, **settings)
    inner = wrapped.get_base_model()
    before = {each: weight.detach().clone() for each, weight in inner.named_parameters()}
    module = SFTModule(inner if form == "injected" else wrapped)
    module.configure_model()
    assert module.model is inner
    assert all(torch.equal(before[each], weight) for each, weight in inner.named_parameters())
    # What a checkpoint holds: plain values that make the same adapters.
    settings = module.builder.arguments_for(inner)
    again = SFTModule(build(name), lora=settings["lora"])
    again.configure_model()
    assert again.model.adapter_names == inner.adapter_names == module.builder.build().adapter_names
    again.model.load_state_dict(inner.state_dict())
    assert torch.equal(logits(again.model), logits(inner))


def test_adapters_that_transformers_has_loaded_are_taken_as_they_are(tmp_path):
    write(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path / "adapters"), is_trainable=True)
    expected = logits(model)
    module = SFTModule(model)
    module.configure_model()
    assert torch.equal(logits(module.model), expected)
    assert torch.equal(logits(ModelBuilder(tmp_path / "adapters").build()), expected)


def test_a_name_that_brings_adapters_with_it_is_refused_with_the_way_to_train_them(tmp_path, monkeypatch):
    """As a name on a hub does; here the folder is not looked into beforehand."""
    write(tmp_path)
    monkeypatch.setattr("lightning_sft.model.builder.is_adapter_folder", lambda path: False)
    with pytest.raises(SettingsError, match=r"brings adapters with it\. Download them \(`hf download NAME"):
        SFTModule(str(tmp_path / "adapters")).configure_model()


def test_a_model_whose_adapters_could_not_be_loaded_again_is_refused_at_once(tmp_path):
    def refused(message, change, **settings):
        model = write(tmp_path, **settings)
        change(model)
        with pytest.raises(SettingsError, match=message):
            SFTModule(model)

    config = LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM")
    refused(
        "has the adapters default, other, but only one is supported", lambda model: model.add_adapter("other", config)
    )
    refused("are merged", lambda model: model.merge_adapter())
    refused("are switched off", lambda model: model.base_model.disable_adapter_layers())
    refused("Load them with `is_trainable=True`", lambda model: model.requires_grad_(False))
    refused("`model.norm.weight` is to be trained beside", lambda model: model.model.model.norm.requires_grad_())
    first = "model.model.model.layers.0.self_attn.q_proj"
    refused("is frozen. Give", lambda model: model.get_submodule("base_" + first).lora_A.requires_grad_(False))
    refused("another scale", lambda model: model.get_submodule("base_" + first).set_scale("default", 2))
    more = {"q_proj", "v_proj"}
    refused(
        "do not match their configuration: `.*v_proj.* exists only in the model",
        lambda model: setattr(model.peft_config["default"], "target_modules", more),
    )
    with pytest.raises(SettingsError, match=r"`lora\.r` is 8, but the adapters of `model` are made with 4"):
        SFTModule(write(tmp_path), lora={"r": 8})
    with pytest.raises(SettingsError, match=r"has adapters already, and `lora\.path` is"):
        SFTModule(write(tmp_path), lora={"path": str(tmp_path / "adapters")})
