"""Log-probabilities of labels, and heads that can be taken apart or cannot."""

import math
from types import SimpleNamespace

import pytest
import torch
from adapters import run_get_response_log_probs
from peft import LoraConfig, inject_adapter_in_model
from support.models import tiny_model
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lightning_sft.data.tokens.collation import collate_packed, collate_padded
from lightning_sft.data.tokens.example import Example
from lightning_sft.errors import SettingsError
from lightning_sft.model.attention import packed_inputs
from lightning_sft.model.log_probs import compute_entropy, get_response_log_probs, score_responses
from lightning_sft.model.packing import enable_packing

INF = math.inf


class Recorded(nn.Module):
    """Anything with a `.logits` in its output; takes nothing but `input_ids`, by position."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.seen = logits, None

    def forward(self, input_ids: Tensor, /) -> SimpleNamespace:
        self.seen = input_ids
        return SimpleNamespace(logits=self.logits)


def llama_and_ids() -> tuple[nn.Module, Tensor, Tensor]:
    """A Llama whose distributions are far from uniform, and random tokens."""
    torch.manual_seed(0)
    model = tiny_model(initializer_range=0.5)
    tokens = torch.randint(131, (2, 8))
    return model, tokens[:, :-1], tokens[:, 1:]


def naive_log_probs(model: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    """The logarithm of the softmax, in float64, picked out one by one."""
    probabilities = model(input_ids).logits.double().softmax(dim=-1)
    rows = [
        [probabilities[row, position, label].log() for position, label in enumerate(row_labels)]
        for row, row_labels in enumerate(labels.tolist())
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_get_response_log_probs_equals_the_naive_formula(dtype):
    model, input_ids, labels = llama_and_ids()
    model = model.to(dtype)
    with torch.no_grad():
        scores = run_get_response_log_probs(model, input_ids, labels, True)
        exact = Categorical(logits=model(input_ids).logits.double())
        naive = naive_log_probs(model, input_ids, labels)
    torch.testing.assert_close(scores["log_probs"], exact.log_prob(labels).to(dtype))
    torch.testing.assert_close(scores["log_probs"], naive.to(dtype))
    torch.testing.assert_close(scores["token_entropy"], exact.entropy().to(dtype))
    assert exact.entropy().std() > 0.05  # not all alike, or the test would say little


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("top1", [True, False])
def test_get_response_log_probs_returns_only_what_is_asked_for(entropy, top1):
    model, labels = Recorded(torch.zeros(2, 3, 5)), torch.zeros(2, 3, dtype=torch.int64)
    scores = get_response_log_probs(model, labels, labels, return_token_entropy=entropy, return_is_top1=top1)
    assert set(scores) == {"log_probs"} | ({"token_entropy"} if entropy else set()) | ({"is_top1"} if top1 else set())
    assert {tensor.shape for tensor in scores.values()} == {(2, 3)}
    assert list(get_response_log_probs(model, labels, labels)) == ["log_probs"]


def test_get_response_log_probs_reads_the_logits_of_any_module_called_with_input_ids():
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]])
    model, input_ids = Recorded(probabilities.log()), torch.tensor([[2, 0]])
    scores = get_response_log_probs(model, input_ids, torch.tensor([[1, 1]]), return_is_top1=True)
    assert model.seen is input_ids
    torch.testing.assert_close(scores["log_probs"], torch.tensor([[math.log(0.25), math.log(0.75)]]))
    assert scores["is_top1"].tolist() == [[False, True]]


def test_get_response_log_probs_passes_further_arguments_to_the_model():
    model, input_ids, labels = llama_and_ids()
    positions = torch.arange(7).flip(0).expand(2, 7)
    with torch.no_grad():
        given = get_response_log_probs(model, input_ids, labels, position_ids=positions)["log_probs"]
        expected = model(input_ids, position_ids=positions, use_cache=False).logits.log_softmax(dim=-1)
    torch.testing.assert_close(given, expected.gather(-1, labels[..., None])[..., 0])


def test_get_response_log_probs_upcasts_half_precision_before_anything_else():
    logits = (3 * torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))).bfloat16()
    labels = torch.arange(10).view(2, 5)
    scores = get_response_log_probs(Recorded(logits), labels, labels, return_token_entropy=True)
    exact = Categorical(logits=logits.double())
    torch.testing.assert_close(scores["log_probs"], exact.log_prob(labels).float())
    torch.testing.assert_close(scores["token_entropy"], exact.entropy().float())


@pytest.mark.parametrize("logits", [[1e4, 1e4 - 1, -1e4], [-1e30, -1e30, 2.0], [0.0, -INF, 3.0]])
def test_get_response_log_probs_stays_finite_for_huge_logits(logits):
    given = torch.tensor([[logits, logits]], requires_grad=True)
    labels = torch.tensor([[0, 2]])
    log_probs = get_response_log_probs(Recorded(given), labels, labels)["log_probs"]
    exact = Categorical(logits=torch.tensor([[logits, logits]], dtype=torch.float64), validate_args=False)
    torch.testing.assert_close(log_probs.double(), exact.log_prob(labels), rtol=1e-6, atol=1e-3)  # 1e4 has 1e-3 digits
    log_probs.sum().backward()
    expected = torch.eye(3)[labels] - exact.probs
    torch.testing.assert_close(given.grad.double(), expected.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear head", "logits"])
def test_get_response_log_probs_carries_the_gradient_of_any_weights_and_of_an_entropy_bonus(kind):
    model, input_ids, labels = llama_and_ids()
    model = model.double()
    if kind == "logits":
        model.lm_head = Shifted(16, 131, bias=False).double()
    upstream, bonus = torch.randn(2, 7, dtype=torch.float64), 0.5 * torch.rand(2, 7, dtype=torch.float64)
    scores = get_response_log_probs(model, input_ids, labels, return_token_entropy=True, return_is_top1=True)
    loss = (upstream * scores["log_probs"] + bonus * scores["token_entropy"]).sum()
    p = model(input_ids).logits.softmax(dim=-1)
    naive = (upstream * naive_log_probs(model, input_ids, labels) - bonus * (p * p.log()).sum(dim=-1)).sum()
    parameters = dict(model.named_parameters())
    given, expected = (torch.autograd.grad(each, parameters.values()) for each in (loss, naive))
    for name, ours, theirs in zip(parameters, given, expected, strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), name  # its norms are float32
        assert theirs.abs().max() > 1e-6, name


def test_get_response_log_probs_masks_nothing():
    model, input_ids, labels = llama_and_ids()
    with torch.no_grad():
        whole = get_response_log_probs(model, input_ids, labels)["log_probs"]
        first = get_response_log_probs(model, input_ids[:, :3], labels[:, :3])["log_probs"]
    assert (whole < 0).all()
    torch.testing.assert_close(whole[:, :3], first)  # causal: what comes after changes nothing


# -- heads: those that can be taken apart, and those that cannot -------------------------------------------------------


def build(model_type, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(ids | sizes | settings)))


HEADS = {
    "tied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "untied": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
    "bias (Phi)": ("phi", {}),
    "soft-capped (Gemma 2)": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0, "num_key_value_heads": 4}),
    "divided (Granite)": ("granite", {"logits_scaling": 7.0}),
    "multiplied (Cohere)": ("cohere", {"logit_scale": 0.3}),
}


def tokens_and_mask():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, (3, 10), generator=generator)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4:8] = mask[1, 2:3] = mask[2, 7:] = True
    return tokens[:, :-1], tokens[:, 1:], mask


@pytest.mark.parametrize("name", HEADS)
def test_a_head_taken_apart_gives_the_scores_and_gradients_of_the_models_own_logits(name):
    model_type, settings = HEADS[name]
    model = build(model_type, **settings).double().eval()
    if name == "bias (Phi)":
        nn.init.normal_(model.lm_head.bias)
    input_ids, labels, mask = tokens_and_mask()
    naive = naive_log_probs(model, input_ids, labels)
    entropy = compute_entropy(model(input_ids).logits)
    sizes = set()
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: sizes.add(output.shape[-1]))
    get_response_log_probs(model, input_ids, labels)  # tries the head out
    sizes.clear()
    scores = get_response_log_probs(model, input_ids, labels, True, response_mask=mask)
    loss = score_responses(model, input_ids, labels, mask.flatten().nonzero()[:, 0], normalize_constant=4.0).loss
    assert sizes == {1}  # no logits
    assert "forward" not in vars(model.get_output_embeddings())
    torch.testing.assert_close(scores["log_probs"], naive * mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores["token_entropy"], entropy * mask, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(-naive[mask].sum() / 4, parameters, allow_unused=True)
    for ours in (-scores["log_probs"].sum() / 4, loss):
        for given, reference in zip(torch.autograd.grad(ours, parameters, allow_unused=True), expected, strict=True):
            if reference is not None:
                assert (given - reference).norm() <= 1e-4 * reference.norm() + 1e-9


class Warmed(LlamaForCausalLM):
    """Does something to its logits that no setting tells of."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits.sign() * output.logits.abs().sqrt()
        return output


class Shifted(nn.Linear):
    """A linear layer that does more, as adapters do."""

    def forward(self, hidden):
        return super().forward(hidden) + hidden.mean(dim=-1, keepdim=True) * torch.arange(self.out_features)


@pytest.mark.parametrize("kind", ["logits", "layer"])
def test_a_head_that_does_more_is_not_taken_apart(kind):
    config = tiny_model(initializer_range=0.5).config
    model = Warmed(config) if kind == "logits" else LlamaForCausalLM(config)
    if kind == "layer":
        model.lm_head = Shifted(16, 131, bias=False)
    input_ids, labels, mask = tokens_and_mask()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    scores = get_response_log_probs(model, input_ids, labels, True, response_mask=mask, return_is_top1=True)
    assert shapes[-1] == (3, 6)  # of 9 columns those in which any row has a response
    logits = model(input_ids).logits
    torch.testing.assert_close(scores["log_probs"], naive_log_probs(model, input_ids, labels).float() * mask)
    torch.testing.assert_close(scores["token_entropy"], compute_entropy(logits) * mask)
    assert torch.equal(scores["is_top1"], (logits.argmax(-1) == labels) & mask)
    positions = mask.flatten().nonzero()[:, 0]
    loss = score_responses(model, input_ids, labels, positions, normalize_constant=4.0).loss
    torch.testing.assert_close(loss, -scores["log_probs"].sum() / 4)
    none = score_responses(model, input_ids, labels, positions[:0], normalize_constant=4.0).loss
    none.backward()
    assert none.item() == 0  # and still part of the graph
    assert model.model.embed_tokens.weight.grad.abs().sum() == 0


def cooled(output):
    """Logits or an output with them, at another temperature."""
    if isinstance(output, Tensor):
        return output / 0.7
    output.logits = output.logits / 0.7
    return output


def wrap_forward(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: cooled(forward(*args, **kwargs))


class Cooled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return cooled(super().forward(*args, **kwargs))


COOLED = {
    "hook of the head": lambda model: model.lm_head.register_forward_hook(lambda _, inputs, output: cooled(output)),
    "hook of the model": lambda model: model.register_forward_hook(lambda _, inputs, output: cooled(output)),
    "wrapped forward": wrap_forward,
    "another class": lambda model: setattr(model, "__class__", Cooled),
}


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("place", COOLED)
def test_what_a_hook_or_a_wrapper_does_to_the_logits_counts_whenever_it_is_added(place, used_before):
    model, input_ids, labels = llama_and_ids()
    if used_before:
        get_response_log_probs(model, input_ids, labels)
    COOLED[place](model)
    given = get_response_log_probs(model, input_ids, labels)["log_probs"]
    torch.testing.assert_close(given.double(), naive_log_probs(model, input_ids, labels))


def test_a_cap_in_the_configuration_counts_as_it_is_now():
    model_type, settings = HEADS["soft-capped (Gemma 2)"]
    model, (input_ids, labels, _) = build(model_type, **settings).eval(), tokens_and_mask()
    for cap in (3.0, 0.5, None):
        model.config.final_logit_softcapping = cap
        given = get_response_log_probs(model, input_ids, labels)["log_probs"]
        torch.testing.assert_close(given.double(), naive_log_probs(model, input_ids, labels), rtol=1e-4, atol=1e-5)


def test_of_a_head_that_adapters_have_a_copy_of_the_one_in_use_is_scored():
    """As where the model before reinforcement learning is that without its adapters."""
    model, input_ids, labels = llama_and_ids()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name="policy")
    nn.init.normal_(model.lm_head.modules_to_save["policy"].weight)
    given = [get_response_log_probs(model, input_ids, labels)["log_probs"]]
    expected = [naive_log_probs(model, input_ids, labels)]
    model.lm_head.enable_adapters(False)
    given.append(get_response_log_probs(model, input_ids, labels)["log_probs"])
    expected.append(naive_log_probs(model, input_ids, labels))
    torch.testing.assert_close(torch.stack(given).double(), torch.stack(expected))


def test_logits_that_do_not_match_the_tokens_are_refused():
    """Those of prompt tuning stand behind as many of its own."""
    ids = torch.zeros((1, 2), dtype=torch.int64)
    with pytest.raises(SettingsError, match=r"gives 3 columns of logits, expected 2, .* as prompt tuning does, give"):
        get_response_log_probs(Recorded(torch.zeros(1, 3, 5)), ids, ids)


def test_trying_a_head_out_draws_nothing_and_happens_once():
    model = tiny_model(attention_dropout=0.5).train()
    input_ids, labels, _ = tokens_and_mask()
    state, calls = torch.get_rng_state(), []
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: calls.append(1) if output.shape[-1] > 1 else None
    )
    first = get_response_log_probs(model, input_ids, labels)["log_probs"]
    torch.set_rng_state(state)
    second = get_response_log_probs(model, input_ids, labels)["log_probs"]
    assert torch.equal(first, second)
    assert len(calls) == 1


def test_a_response_mask_of_numbers_counts_ones():
    model, (input_ids, labels, mask) = tiny_model(), tokens_and_mask()
    scores = [
        get_response_log_probs(model, input_ids, labels, response_mask=m)["log_probs"] for m in (mask, mask.int())
    ]
    assert torch.equal(*scores)


def test_packed_documents_are_scored_as_padded_ones():
    model = tiny_model(initializer_range=0.5)
    examples = [
        Example(input_ids=list(range(5, 5 + length)), num_prompt_tokens=prompt)
        for length, prompt in ((9, 3), (4, 1), (12, 10), (2, 0))
    ]
    padded, packed = collate_padded(examples), collate_packed(examples)
    expected = get_response_log_probs(model, padded.input_ids, padded.labels, True, response_mask=padded.response_mask)
    assert enable_packing(model) is None
    given = get_response_log_probs(
        model,
        packed.input_ids,
        packed.labels,
        True,
        response_mask=packed.response_mask,
        **packed_inputs(model, packed.model_inputs()),
    )
    for name in expected:
        torch.testing.assert_close(given[name][packed.response_mask], expected[name][padded.response_mask])


def test_a_token_that_the_head_does_not_have_is_refused_as_by_the_naive_formula():
    """Such as an EOS that was added to the tokenizer, and is never an input."""
    model, ids = tiny_model(), torch.tensor([[5, 6]])
    get_response_log_probs(model, ids, torch.tensor([[6, 130]]))
    with pytest.raises(
        SettingsError, match=r"the token 131, but the model's head has only 131, from 0 on.* `model.res"
    ):
        get_response_log_probs(model, ids, torch.tensor([[6, 131]]))


def test_a_negative_label_is_refused_where_it_is_scored():
    """The naive formula could not look it up either."""
    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    labels = torch.tensor([[6, -100, 8]])
    with pytest.raises(SettingsError, match=r"`labels` has a negative number, such as -100, .* Give `response_mask`"):
        get_response_log_probs(model, ids, labels)
    masked = get_response_log_probs(model, ids, labels, response_mask=labels >= 0)["log_probs"]
    assert (masked != 0).tolist() == [[True, False, True]]
    for options in ({"response_mask": labels[:, 1:] >= 0}, {"input_ids": ids[:, 1:]}):  # of a batch before the shift
        (name,) = options
        with pytest.raises(SettingsError, match=rf"`{name}` is of shape \(1, 2\), expected that of `labels`, \(1, 3\)"):
            get_response_log_probs(model, **({"input_ids": ids, "labels": labels} | options))
