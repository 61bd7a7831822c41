"""The router loss of a mixture of experts: that of the whole optimizer step, however it is split."""

import copy

import pytest
import torch
from support.architectures import tiny_architecture
from support.processes import Processes
from support.runs import read_log, train
from support.sweep import ROWS, difference, first_step, gradients_of, token_rows
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

pytestmark = pytest.mark.filterwarnings("ignore")  # of architectures that miss their kernels

COEFFICIENT = 0.7
ASKED = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}


def naive_step_with_routing(model):
    """Each row alone through the plain model, and `transformers`' own loss over what all rows' routers have said."""
    tokens = token_rows(ROWS)
    total, loss, routed = sum(len(ids) - num_prompt for ids, num_prompt in tokens), 0, []
    for ids, num_prompt in tokens:
        output = model(ids[None, :-1], use_cache=False, output_router_logits=True)
        log_p = output.logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        loss = loss - log_p[num_prompt - 1 :].sum() / total
        routed.append(output.router_logits)
    layers = tuple(map(torch.cat, zip(*routed, strict=True)))
    router_loss = COEFFICIENT * load_balancing_loss_func(layers, model.num_experts, model.num_experts_per_tok)
    (loss + router_loss).backward()
    return (loss + router_loss).item(), router_loss.item(), gradients_of(model)


MIXTURES = {
    "mixtral": ASKED,
    "qwen2_moe": ASKED | {"use_sliding_window": False},
    "olmoe": ASKED,
    "phimoe": ASKED | {"sliding_window": None},
    "granitemoe": ASKED,
    "gpt_oss": ASKED,
    "jamba": ASKED,
    "jetmoe": {"output_router_logits": True, "aux_loss_coef": COEFFICIENT},
}
SPLITS = [{}, {"layout": "padded"}, {"gradient_accumulation_steps": 3}]
PADDED = ("gpt_oss", "jamba")  # with the setting or without


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_loss_of_routing_is_that_of_all_rows_together(model_type, split):
    model = tiny_architecture(model_type, **MIXTURES[model_type]).train()
    loss, router_loss, gradients = naive_step_with_routing(copy.deepcopy(model))
    assert router_loss > 0.1
    sft, given_loss, given = first_step(model, **split)
    assert given_loss == pytest.approx(loss, rel=2e-5)
    assert sft.trainer.callback_metrics["train/router_loss"].item() == pytest.approx(router_loss, rel=2e-5)
    assert difference(given, gradients) < 2e-5
    assert (sft.why_not_packed is None) == (model_type not in PADDED)


def test_without_being_asked_there_is_no_such_loss():
    sft, _, _ = first_step(tiny_architecture("mixtral", output_router_logits=False))
    assert "train/router_loss" not in sft.trainer.callback_metrics
    sft, _, _ = first_step(tiny_architecture("mixtral", output_router_logits=True, router_aux_loss_coef=0.0))
    assert "train/router_loss" not in sft.trainer.callback_metrics


MIXTURE = ASKED | {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("strategy", "microbatches"), [("ddp", 1), ("ddp", 3), pytest.param("fsdp", 1, marks=pytest.mark.slow), ("fsdp", 3)]
)
def test_two_processes_route_as_one(tmp_path, strategy, microbatches):
    one = train(tmp_path / "one", config=MIXTURE, max_steps=4)
    options = {"config": MIXTURE, "max_steps": 4, "data": {"gradient_accumulation_steps": microbatches}}
    assert Processes(train, tmp_path / "two", strategy=strategy, world_size=2, **options).wait() == [0, 0]
    two = torch.load(tmp_path / "two" / "result.pt")
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    assert difference(two["gradients"], one["gradients"]) < 1e-5
    logs = [read_log(tmp_path / name / "steps_0.jsonl") for name in ("one", "two")]
    routed = [[step["train/router_loss"] for step in log] for log in logs]
    assert routed[1] == pytest.approx(routed[0], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_balances_its_routers_like_float32(tmp_path, precision):
    logged = []
    for name in ("32-true", precision):
        train(tmp_path / name, config=MIXTURE, max_steps=2, precision=name)
        logged.append([step["train/router_loss"] for step in read_log(tmp_path / name / "steps_0.jsonl")])
    assert logged[1] == pytest.approx(logged[0], rel=0.05)
    assert logged[1] != logged[0]


def test_a_loss_that_is_computed_otherwise_is_refused(monkeypatch):
    def doubled(gate_logits, num_experts=None, top_k=2, attention_mask=None):
        return 2 * load_balancing_loss_func(gate_logits, num_experts, top_k, attention_mask)

    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", doubled)
    with pytest.raises(ValueError, match="whose router loss is not supported"):
        first_step(tiny_architecture("mixtral", **ASKED))


def test_a_loss_of_large_logits_is_refused():
    with pytest.raises(ValueError, match=r"`z_loss_coefficient` = 0\.1, a loss that is not supported\. Set it to 0"):
        first_step(tiny_architecture("bamba", z_loss_coefficient=0.1))


def test_dropout_routes_the_step_as_it_was_counted(monkeypatch):
    """What is counted ahead is what the backward passes see: the parts add up to the loss of the same routing."""
    model = tiny_architecture("mixtral", attention_dropout=0.5, **ASKED)
    routed = {True: [], False: []}

    def watch(module, inputs, output):
        routed[torch.is_grad_enabled()].append(output[0].detach() if isinstance(output, tuple) else output.detach())

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(watch)
    first_step(model, gradient_accumulation_steps=3)
    ahead, trained = routed[False][-len(routed[True]) :], routed[True]
    assert len(trained) == 6
    for one, other in zip(ahead, trained, strict=True):
        assert torch.equal(one, other)
