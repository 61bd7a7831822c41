"""Parameters with settings of their own, and parameters that are not trained, by their names."""

import pytest
import torch
from support.fits import ROWS, make_trainer
from support.lora import MODELS, build
from support.models import character_tokenizer, tiny_config, tiny_model
from support.processes import Processes
from support.runs import train
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.errors import SettingsError, SettingsTypeError
from lightning_sft.training.parameter_groups import number_as_in_module

NO_DECAY = "bias$|norm|ln_"  # as the docstring of `SFTModule` has it
GROUPS = [{"pattern": NO_DECAY, "weight_decay": 0.0}, {"pattern": "lm_head", "lr": 0.05}]


def adamw(params, **options):
    return torch.optim.AdamW(params, **({"lr": 0.01, "weight_decay": 0.5} | options))


def names_of(optimizer, model):
    names = {weight: name for name, weight in model.named_parameters()}
    return [{names[weight] for weight in group["params"]} for group in optimizer.param_groups]


def optimizer_of(module):
    module.configure_model()
    return module.parameter_groups.make_optimizer(module.optimizer_factory, module)


@pytest.mark.parametrize("name", [*MODELS, "gemma2", "phi", "cohere2", "qwen3", "olmo2"])
def test_the_documented_pattern_is_that_of_all_norms_and_biases(name):
    if name in MODELS:
        model = build(name)
    else:
        config = AutoConfig.for_model(
            name, **{key: value for key, value in tiny_config().items() if key != "model_type"}
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    module = SFTModule(model, parameter_groups=[{"pattern": NO_DECAY, "weight_decay": 0.0}])
    optimizer = module.parameter_groups.make_optimizer(module.optimizer_factory, module)
    vectors = {each for each, weight in model.named_parameters() if weight.ndim < 2}
    assert names_of(optimizer, model)[1] == vectors
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_a_pattern_to_which_those_before_leave_nothing_is_refused():
    module = SFTModule(tiny_config(), parameter_groups=[*GROUPS, {"pattern": "lm_head", "lr": 1.0}])
    with pytest.raises(SettingsError, match="has 'lm_head', but all that it matches belongs to a pattern before it"):
        optimizer_of(module)


def test_patterns_see_each_name_in_the_model_also_of_a_tied_weight_and_may_take_all_parameters():
    module = SFTModule(build("tied"), optimizer=adamw, parameter_groups=[{"pattern": "^lm_head", "lr": 0.5}])
    assert names_of(optimizer_of(module), module.model)[1] == {"model.embed_tokens.weight"}
    module = SFTModule(tiny_config(), optimizer=adamw, parameter_groups=[{"pattern": ".", "lr": 0.5}])
    assert len(optimizer_of(module).param_groups) == 1


@pytest.mark.parametrize("group", [{"pattern": "norm"}, {"pattern": "norm", "params": []}])
def test_a_group_without_settings_or_with_parameters_is_refused(group):
    with pytest.raises(SettingsError, match="expected a `pattern` of names and settings"):
        SFTModule("model", parameter_groups=[group])


def test_the_first_pattern_counts_and_all_others_have_the_optimizer_s_own_settings():
    module = SFTModule(tiny_config(), optimizer=adamw, parameter_groups=[{"pattern": "layers.0", "lr": 0.3}, *GROUPS])
    optimizer = optimizer_of(module)
    rest, first, norms, head = names_of(optimizer, module.model)
    assert all("layers.0" in name for name in first)
    assert len(first) == 9
    assert norms == {"model.norm.weight"} | {
        f"model.layers.1.{n}_layernorm.weight" for n in ("input", "post_attention")
    }
    assert head == {"lm_head.weight"}
    assert rest | first | norms | head == {name for name, _ in module.model.named_parameters()}
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.3, 0.01, 0.05]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0, 0.5]


def test_one_step_is_the_naive_one_of_each_parameter_by_itself(tmp_path):
    torch.manual_seed(0)
    model = tiny_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    module = SFTModule(model, optimizer=adamw, parameter_groups=GROUPS, lr_scheduler="constant", max_grad_norm=None)
    gradients = {}
    module.on_before_optimizer_step = lambda optimizer: (
        gradients.update({name: weight.grad.clone() for name, weight in model.named_parameters()}),
        SFTModule.on_before_optimizer_step(module, optimizer),
    )
    make_trainer(tmp_path, max_steps=1).fit(module, SFTDataModule(character_tokenizer(), ROWS, batch_size=4))
    for name, weight in model.named_parameters():
        lr = 0.05 if name == "lm_head.weight" else 0.01
        decay = 0.0 if weight.ndim < 2 else 0.5
        step = gradients[name] / (gradients[name].abs() + 1e-8)  # of Adam's first step
        torch.testing.assert_close(weight.detach(), before[name] * (1 - lr * decay) - lr * step, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_as_they_are_and_have_no_state(tmp_path):
    model = tiny_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    module = SFTModule(model, optimizer=adamw, freeze=["embed_tokens", "layers.0[.]"])
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, SFTDataModule(character_tokenizer(), ROWS, batch_size=4))
    same = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert same == {name for name in before if "embed_tokens" in name or "layers.0." in name}
    assert len(trainer.optimizers[0].state) == len(before) - len(same)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), model.parameters(), strict=True))
    assert [weight.requires_grad for weight in loaded.model.parameters()] == [name not in same for name in before]


SETTINGS = {"parameter_groups": GROUPS, "freeze": ["embed_tokens"]}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_with_groups_and_frozen_parameters_are_one(tmp_path, strategy):
    whole = train(tmp_path / "whole", module=SETTINGS, dtype="float64")
    processes = Processes(train, tmp_path, module=SETTINGS, dtype="float64", strategy=strategy, world_size=2)
    assert processes.wait(timeout=240) == [0, 0]
    result = torch.load(tmp_path / "result.pt")
    assert result["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name, weight in result["weights"].items():
        torch.testing.assert_close(weight, whole["weights"][name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("key", ["state", "fast_state"])
def test_an_optimizer_with_parameters_or_states_of_its_own_is_saved_as_it_is(key):
    module = tiny_model()
    weights = [torch.nn.Parameter(torch.ones(2))] if key == "state" else module.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1)
    state = {key: {}, "param_groups": optimizer.state_dict()["param_groups"]}
    number_as_in_module(state, optimizer, module)
    assert state == {key: {}, "param_groups": optimizer.state_dict()["param_groups"]}


def test_adapters_can_have_a_rate_of_their_own():
    groups = [{"pattern": "lora_B", "lr": 0.16}]
    module = SFTModule(tiny_config(), optimizer=adamw, lora={"r": 2}, parameter_groups=groups)
    first, second = names_of(optimizer_of(module), module.model)
    assert {name.split(".")[-3] for name in first} == {"lora_A"}
    assert {name.split(".")[-3] for name in second} == {"lora_B"}


def test_a_tied_weight_is_found_by_each_of_its_names():
    module = SFTModule(build("tied"), freeze=["lm_head"])
    module.configure_model()
    frozen = [name for name, weight in module.model.named_parameters() if not weight.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


REFUSED = {
    r"`freeze` has '\(', which is not a regular expression": {"freeze": ["("]},
    "`freeze` has 'layer9', which matches no name of a parameter. Names are, for example, model.embed_tokens.weight": {
        "freeze": ["layer9"]
    },
    r"`freeze` is \['.'\], which leaves nothing to train": {"freeze": ["."]},
    "`parameter_groups` has .*, expected a `pattern` of names and settings": {"parameter_groups": [{"lr": 0.1}]},
    "`parameter_groups` has 'layer9', which matches no name": {"parameter_groups": [{"pattern": "layer9", "lr": 0.1}]},
    "`parameter_groups` sets `weigth_decay`, which AdamW does not have. It has amsgrad, betas": {
        "parameter_groups": [{"pattern": "norm", "weigth_decay": 0.1}]
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_fits_no_parameter_is_refused(message):
    with pytest.raises(SettingsError, match=message):
        optimizer_of(SFTModule(tiny_config(), optimizer=adamw, **REFUSED[message]))


@pytest.mark.parametrize("settings", [{"freeze": "norm"}, {"freeze": [3]}, {"parameter_groups": ["norm"]}])
def test_what_is_no_list_of_patterns_or_groups_is_refused(settings):
    with pytest.raises(SettingsTypeError, match=f"`{next(iter(settings))}` is .*, expected a list of"):
        SFTModule("model", **settings)


def test_what_makes_no_optimizer_is_refused():
    module = SFTModule(tiny_config(), optimizer=lambda params: torch.optim.AdamW)
    module.configure_model()
    with pytest.raises(SettingsError, match=r"`optimizer` is <class .*, expected a function that makes an optimizer"):
        module.parameter_groups.make_optimizer(module.optimizer_factory, module)
