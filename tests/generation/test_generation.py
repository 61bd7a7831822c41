"""Generation records against a naive decoder, and a model left as it was found."""

import math
from collections import Counter

import pytest
import torch
from support.architectures import tiny_architecture
from support.cuda import NEEDS_CUDA
from support.models import character_tokenizer, tiny_model

from lightning_sft import Sampling, log_generations

PROMPTS = ["a", "abcdef", "xy"]
EOS = 128


def length_reward(response, ground_truth):
    return {"format_reward": 1.0, "answer_reward": float(len(response) > 5), "reward": 0.5}


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = tiny_model(initializer_range=0.3)
    model.lm_head.weight.data[128:] = 0.0  # special tokens do not win by chance
    return model


def generate(
    model,
    prompts=PROMPTS,
    reward_fn=length_reward,
    tokenizer=None,
    ground_truths=None,
    max_tokens_per_batch=40,
    first_index=0,
    **sampling,
):
    return log_generations(
        model,
        tokenizer or character_tokenizer(),
        prompts,
        ground_truths or ["g"] * len(prompts),
        reward_fn,
        sampling=Sampling(**({"max_new_tokens": 12} | sampling)),
        max_tokens_per_batch=max_tokens_per_batch,
        first_index=first_index,
    )


def distribution(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def greedy(model, prompt, max_new_tokens):
    """One token at a time, no cache, no padding; with the log-probability of each and the entropy it was drawn at."""
    ids, log_probs, entropies = [ord(char) for char in prompt], [], []
    for _ in range(max_new_tokens):
        p = distribution(model, ids)
        entropies.append(-sum(x * math.log(x) for x in p.tolist()))
        log_probs.append(math.log(p.max()))
        ids.append(int(p.argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :], log_probs, entropies


def test_log_generations_equals_greedy_decoding_one_token_at_a_time(model):
    records, _ = generate(model)
    for index, (prompt, record) in enumerate(zip(PROMPTS, records, strict=True)):
        ids, log_probs, entropies = greedy(model, prompt, 12)
        assert (record.index, record.sample, record.prompt) == (index, 0, prompt)
        assert record.response == "".join(map(chr, ids))
        assert record.token_ids == ids
        assert record.response_length == len(ids)
        assert record.token_log_probs == pytest.approx(log_probs, rel=1e-4)
        assert record.token_entropies == pytest.approx(entropies, rel=1e-4)
        assert record.token_entropy == pytest.approx(sum(entropies) / len(ids), rel=1e-5)


@pytest.mark.parametrize("temperature", [pytest.param(value, marks=NEEDS_CUDA) for value in (0.0, 0.7)])
def test_a_gpu_writes_what_the_cpu_does_and_scores_it_alike(model, temperature):
    options = {"temperature": temperature, "top_p": 0.9 if temperature else 1.0, "seed": 3}
    expected = generate(model, **options)[0]
    model.to("cuda")
    records = generate(model, **options)[0]
    assert records == generate(model, **options)[0]
    for record, reference in zip(records, expected, strict=True):
        assert record.token_ids == reference.token_ids
        assert record.token_log_probs == pytest.approx(reference.token_log_probs, rel=1e-4, abs=1e-4)
        assert record.token_entropies == pytest.approx(reference.token_entropies, rel=1e-4, abs=1e-4)


def test_responses_that_have_ended_leave_the_batch_and_change_no_other(model, monkeypatch):
    """Prompts of any length, greedy and sampled: each response is what its prompt gets alone."""
    model.lm_head.weight.data[EOS] = model.lm_head.weight.data[:128].mean(dim=0) * 4  # some responses end soon
    prompts = [chr(97 + i % 26) * (1 + i % 7) for i in range(12)]
    sizes = []
    generate_batch = model.generate
    monkeypatch.setattr(
        model, "generate", lambda ids, **options: sizes.append(len(ids)) or generate_batch(ids, **options)
    )
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"stop_strings": ["e", "r3"], "temperature": 1.0}):
        options |= {"max_new_tokens": 40}
        alone = [generate(model, [prompt], first_index=i, **options)[0][0] for i, prompt in enumerate(prompts)]
        sizes.clear()
        together, _ = generate(model, prompts, max_tokens_per_batch=10_000, **options)
        assert len(sizes) > 1
        assert sizes[0] == 12
        assert sizes == sorted(sizes, reverse=True)
        assert [record.token_ids for record in together] == [record.token_ids for record in alone]
        assert [record.stop_reason for record in together] == [record.stop_reason for record in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.token_log_probs == pytest.approx(other.token_log_probs, abs=1e-5)


def test_a_stop_string_does_not_begin_in_the_prompt(model):
    (expected,) = generate(model, ["a"])[0]
    (record,) = generate(model, ["a"], stop_strings=["a" + expected.response[0]])[0]
    assert record.token_ids == expected.token_ids


def test_a_response_ends_in_eos_or_a_stop_string_or_at_its_longest(model):
    ids, *_ = greedy(model, "a", 12)
    assert EOS not in ids
    (record,) = generate(model, ["a"])[0]
    assert (record.stop_reason, record.response_length) == ("length", 12)
    stop = record.response[3:5]
    (stopped,) = generate(model, ["a"], stop_strings=[stop])[0]
    assert stopped.response == record.response[: record.response.index(stop) + 2]
    assert (stopped.stop_reason, stopped.response_length) == ("stop", len(stopped.response))
    model.lm_head.weight.data[EOS] = model.lm_head.weight.data[ids[4]] * 1.5  # EOS now wins where the fifth token did
    ended_ids, *_ = greedy(model, "a", 12)
    assert ended_ids[-1] == EOS
    (ended,) = generate(model, ["a"])[0]
    assert (ended.stop_reason, ended.response_length) == ("eos", len(ended_ids))
    assert len(ended.response) == len(ended_ids) - 1
    assert "".join(ended.tokens) == ended.response + character_tokenizer().eos_token


def test_sampling_follows_its_own_seed_only(model):
    def responses(seed, ambient):
        torch.manual_seed(ambient)
        return [record.response for record in generate(model, temperature=1.0, seed=seed)[0]]

    assert responses(1, ambient=5) == responses(1, ambient=6)
    assert responses(1, ambient=5) != responses(2, ambient=5)
    assert responses(1, ambient=5) != [record.response for record in generate(model)[0]]


def test_a_sample_depends_on_seed_and_numbers_but_not_on_what_shares_its_batch(model):
    options = {"temperature": 1.0, "num_samples": 3, "seed": 7}
    together, _ = generate(model, max_tokens_per_batch=1000, **options)
    assert [(record.index, record.sample) for record in together] == [(i, k) for i in range(3) for k in range(3)]
    assert len({record.response for record in together if record.index == 1}) == 3
    one_by_one, _ = generate(model, max_tokens_per_batch=1, **options)
    last, _ = generate(model, PROMPTS[2:], first_index=2, **options)
    assert [record.response for record in one_by_one] == [record.response for record in together]
    assert [record.response for record in last] == [record.response for record in together[6:]]


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({}, lambda p: p > 0),
        ({"top_k": 3}, lambda p: p >= p.sort().values[-3]),
        ({"top_p": 0.5}, lambda p: torch.tensor([p[p > each].sum() < 0.5 for each in p])),
    ],
    ids=["all", "top_k", "top_p"],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(model, options, keep):
    num_samples, temperature = 2000, 0.7
    p = distribution(model, [ord("a")]).pow(1 / temperature)
    p = torch.where(keep(p / p.sum()), p, 0.0)
    p = p / p.sum()
    options |= {"temperature": temperature, "num_samples": num_samples, "max_new_tokens": 1}
    records, _ = generate(model, ["a"], max_tokens_per_batch=10_000, **options)
    counts = Counter(record.token_ids[0] for record in records)
    for token, share in enumerate(p.tolist()):
        spread = math.sqrt(num_samples * share * (1 - share))
        assert abs(counts[token] - num_samples * share) <= 4.5 * spread, token  # of 131 tokens, one in 1,000 times


def test_batches_keep_to_their_tokens_and_hold_prompts_of_similar_length(model, monkeypatch):
    shapes, original = [], model.generate

    def watched(input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return original(input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", watched)
    prompts = ["p" * length for length in (9, 2, 30, 5, 2, 3)]
    generate(model, prompts, max_new_tokens=4, max_tokens_per_batch=28)
    assert shapes == [
        (3, 3),
        (2, 9),
        (1, 30),
    ]  # rows times (longest prompt + 4) is 21, 26, and 34 alone; 36 with another row


def test_log_generations_leaves_modes_tokenizer_and_randomness_as_they_were(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    settings, tokenizer = model.generation_config.to_dict(), character_tokenizer()
    tokenizer_before, state = tokenizer.backend_tokenizer.to_str(), torch.get_rng_state()
    generate(model, tokenizer=tokenizer, temperature=1.0)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config.to_dict() == settings
    assert tokenizer.backend_tokenizer.to_str() == tokenizer_before
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, character_tokenizer().padding_side)
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_is_put_back_when_generation_fails(model, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    model.train()
    state = torch.get_rng_state()
    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_response_is_as_long_as_the_model_s_positions_allow_whatever_else_is_in_the_batch(model):
    records, _ = generate(model, ["p" * 60, "p" * 62, "p" * 64, "p" * 70, "p" * 10])
    assert [record.response_length for record in records] == [4, 2, 0, 0, 12]
    assert {record.stop_reason for record in records} == {"length"}
    (long,) = generate(model, ["p" * 20], max_new_tokens=50)[0]
    assert long.response_length == 32  # of the 44 there is room for, so that prompts can share a batch


def test_a_mixture_with_a_loss_of_routing_answers_prompts_of_any_length():
    options = {"vocab_size": 131, "num_local_experts": 4, "output_router_logits": True}
    mixture = tiny_architecture("mixtral", **options).eval()
    records, _ = generate(mixture, ["ab", "a longer prompt"], max_new_tokens=4)
    assert [record.response_length for record in records] == [4, 4]


def test_a_prompt_without_tokens_gets_no_response_and_a_bos_alone_is_enough(model):
    empty, full = generate(model, ["", "a"])[0]
    assert (empty.response, empty.response_length, empty.stop_reason) == ("", 0, "empty prompt")
    assert full.response_length == 12
    assert generate(model, [""], tokenizer=character_tokenizer(bos=True))[0][0].response_length == 12


def test_a_reward_that_fails_is_recorded_and_counts_as_zero(model):
    def fragile(response, ground_truth):
        if ground_truth == "bad":
            raise RuntimeError("no verifier")
        return {"reward": 1.0} if ground_truth == "keys" else length_reward(response, ground_truth)

    records, summary = generate(model, reward_fn=fragile, ground_truths=["bad", "keys", "fine"])
    assert records[0].reward_error == "RuntimeError: no verifier"
    assert "fragile" in records[1].reward_error
    assert "answer_reward" in records[1].reward_error
    assert [record.reward for record in records] == [0.0, 0.0, 0.5]
    assert records[2].reward_error is None
    assert summary["reward_failures"] == 2


def test_without_ground_truth_nothing_is_scored(model):
    def never(response, ground_truth):
        raise AssertionError

    records, summary = generate(model, reward_fn=never, ground_truths=[None] * 3)
    assert summary["reward_failures"] == 0
    assert {record.reward for record in records} == {None}
    assert math.isnan(summary["reward"])
    assert summary["response_length"] == 12


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("num_samples", 0)],
)
def test_bad_sampling_parameters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}, expected"):
        Sampling(**{name: value})


def test_several_samples_and_what_narrows_the_choice_need_a_temperature():
    with pytest.raises(ValueError, match="`num_samples` is 4 and `temperature` is 0, which draws the same"):
        Sampling(num_samples=4)
    for name, value in (("top_p", 0.9), ("top_k", 5)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}, but `temperature` is 0, so the most likely"):
            Sampling(**{name: value})
