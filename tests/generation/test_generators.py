"""Responses that something else than the model writes, and that the model scores."""

import re
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.callbacks import fit
from support.models import character_tokenizer, tiny_model
from support.paths import ROOT

from lightning_sft import GenerationMonitor, Response, Sampling, get_response_log_probs, log_generations

PROMPTS = ["a", "abcdef", "xy"]
EOS = 128


def rewards(response, ground_truth):
    return dict.fromkeys(("format_reward", "answer_reward", "reward"), float("b" in response))


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = tiny_model(initializer_range=0.3)
    model.lm_head.weight.data[128:] = 0.0  # special tokens do not win by chance
    return model


def generate(model, generator=None, prompts=PROMPTS, path=None, **sampling):
    settings = Sampling(**({"max_new_tokens": 8} | sampling))
    texts = ["g"] * len(prompts)
    return log_generations(
        model, character_tokenizer(), prompts, texts, rewards, sampling=settings, generator=generator, path=path
    )


# -- an engine with vLLM's interface -----------------------------------------------------------------------------------


@dataclass
class StandInParams:
    max_tokens: int
    seed: int
    temperature: float
    top_p: float
    stop: list[str] | None


class StandInEngine:
    """vLLM's `LLM`, as far as the documented function uses it: greedy decoding, one prompt at a time."""

    def __init__(self, model: str, gpu_memory_utilization: float) -> None:
        self.model = tiny_model()  # of other weights, until it gets those that are trained
        self.model.load_weights = lambda weights: self.model.load_state_dict(dict(weights))
        self.seeds = []

    def apply_model(self, function):
        return [function(self.model)]

    def reset_prefix_cache(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        outputs = []
        for prompt, each in zip(prompts, params, strict=True):
            self.seeds.append(each.seed)
            ids, reason = [], "length"
            while len(ids) < each.max_tokens and reason == "length":
                logits = self.model.eval()(torch.tensor([prompt["prompt_token_ids"] + ids])).logits[0, -1]
                ids.append(int(logits.argmax()))
                text = "".join(map(chr, ids))
                reason = "stop" if ids[-1] == EOS or any(stop in text for stop in each.stop or ()) else "length"
            completion = SimpleNamespace(token_ids=tuple(ids), finish_reason=reason)
            outputs.append(SimpleNamespace(outputs=[completion]))
        return outputs


@pytest.fixture
def vllm_responses(monkeypatch):
    """The module that configs/README.md shows, on top of the stand-in."""
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = StandInEngine, StandInParams
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    text = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# vllm_responses.py\n.*?)```", text, re.DOTALL)
    module = ModuleType("vllm_responses")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "vllm_responses", module)
    return module


def test_an_engine_behind_the_documented_function_gives_the_records_that_the_model_itself_gives(model, vllm_responses):
    with torch.no_grad():
        model.lm_head.weight[EOS] = (
            3 * model.lm_head.weight[generate(model)[0][0].token_ids[5]]
        )  # a response has an end
    whole = next(record for record in generate(model)[0] if record.stop_reason == "length")
    stop = whole.response[2:4]
    for stop_strings in (None, [stop]):
        expected, expected_summary = generate(model, stop_strings=stop_strings)
        given, summary = generate(model, vllm_responses.generate, stop_strings=stop_strings)
        assert given == expected
        assert summary == pytest.approx(expected_summary, nan_ok=True)
        reasons = {record.stop_reason for record in given}
        assert reasons == ({"eos", "stop"} if stop_strings else {"eos", "length"})


def test_each_sample_is_asked_for_with_a_seed_of_its_own_that_its_numbers_give(model, vllm_responses):
    generate(model, vllm_responses.generate, temperature=1.0, num_samples=3)
    first, vllm_responses.llm.seeds = vllm_responses.llm.seeds, []
    generate(model, vllm_responses.generate, PROMPTS[::-1], temperature=1.0, num_samples=3)
    assert len(set(first)) == 9
    assert set(vllm_responses.llm.seeds) == set(first)


def test_the_monitor_writes_down_what_another_generator_answers_at_each_step(tmp_path, vllm_responses):
    def run(name, generator):
        sampling = Sampling(5)
        monitor = GenerationMonitor(rewards, 3, every_n_steps=2, sampling=sampling, generator=generator)
        fit(tmp_path / name, [monitor])
        files = sorted((tmp_path / name / "generations").glob("*.jsonl"))
        return {file.name: file.read_text() for file in files}

    given, expected = run("engine", vllm_responses.generate), run("own", None)
    assert given == expected
    assert len(set(given.values())) > 3  # the engine has followed the weights


# -- any function ------------------------------------------------------------------------------------------------------


def test_the_model_scores_what_it_would_not_have_written(model):
    seen = []

    def scripted(given, requests, sampling):
        assert given is model
        seen.extend((request.prompt.text, request.prompt_ids, request.max_new_tokens) for request in requests)
        texts = {"a": "bcd", "abcdef": "", "xy": "zzb"}
        return [Response(list(map(ord, texts[request.prompt.text])), "stop") for request in requests]

    records, summary = generate(model, scripted)
    assert sorted(seen) == [("a", [97], 8), ("abcdef", list(range(97, 103)), 8), ("xy", [120, 121], 8)]
    assert [record.response for record in records] == ["bcd", "", "zzb"]
    assert [record.stop_reason for record in records] == ["stop"] * 3
    assert summary["answer_reward"] == pytest.approx(2 / 3)
    tokens = torch.tensor([list(map(ord, "abcd"))])
    scores = get_response_log_probs(model, tokens[:, :-1], tokens[:, 1:], True)
    assert records[0].token_log_probs == pytest.approx(scores["log_probs"][0].tolist(), rel=1e-4)
    assert records[0].token_entropies == pytest.approx(scores["token_entropy"][0].tolist(), rel=1e-4)
    assert records[1].token_log_probs == []


def test_what_follows_the_end_of_a_response_is_no_part_of_it(model):
    def padded(given, requests, sampling):
        return [Response([98, EOS, 99, 99], "stop") for _ in requests]

    records, _ = generate(model, padded)
    assert [(record.response, record.token_ids, record.stop_reason) for record in records] == [
        ("b", [98, EOS], "eos")
    ] * 3


def test_what_follows_a_stop_string_is_no_part_of_a_response_either(model):
    def beyond(given, requests, sampling):
        return [Response([97, 98, 99, 99]) for _ in requests]

    records, _ = generate(model, beyond, stop_strings=["b"])
    assert [(record.token_ids, record.stop_reason) for record in records] == [([97, 98], "stop")] * 3


def answers(*responses):
    return lambda model, requests, sampling: responses


REFUSED = {
    "`generator` returned 1 responses to 2 requests.": answers(Response([98])),
    "`generator` returned 'b', expected a `Response` for each request.": answers("b", "b"),
    "a response with the stop reason 'abort', expected one of eos, stop, length": answers(
        *[Response([98], "abort")] * 2
    ),
    "`generator` returned 9 tokens to prompt 0, which has `max_new_tokens` = 8": answers(*[Response([98] * 9)] * 2),
    "`generator` returned the token id 131, expected whole numbers below 131": answers(*[Response([131])] * 2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_response_to_a_request_is_refused(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(model, REFUSED[message], ["a", "b"])


def test_a_generator_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="`generator` is 'vllm', expected a function of model, requests and sampling"):
        GenerationMonitor(generator="vllm")


def test_a_response_without_tokens_to_a_prompt_of_one_token_is_a_record_like_others(model):
    (record,), summary = generate(model, lambda model, requests, sampling: [Response([], "stop")], ["a"])
    assert (record.response, record.response_length, record.token_log_probs) == ("", 0, [])
    assert summary["response_length"] == 0
