import hashlib
import inspect
import operator
import re

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from lightning_sft import r1_zero_reward
from lightning_sft.data.tokens.tokenization import encode_examples
from lightning_sft.examples import story_questions, word_problems, word_tokenizer

OPERATORS = {"+": operator.add, "-": operator.sub}
ADDING = {"buys", "finds", "wins", "gets", "borrows"}


@pytest.fixture(scope="module")
def problems() -> dict[str, list[str]]:
    return word_problems(num_rows=4000, seed=3)[:]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def test_rows_are_determined_by_the_seed_on_every_machine(problems):
    assert word_problems(num_rows=10, seed=3)["output"] == problems["output"][:10]
    assert word_problems(num_rows=10, seed=4)["output"] != problems["output"][:10]
    assert word_problems(num_rows=1)[0] == {
        "prompt": "User: Gus has 30 marbles, lends 8 to Hana, then gives 2 to Hana. "
        "How many marbles does Gus have now? Assistant: <think>",
        "output": " 30 - 8 = 22 ; 22 - 2 = 20 </think> <answer> 20 </answer>",
        "ground_truth": "20",
    }


def test_the_rows_of_the_quickstart_stay_as_they_were_when_its_figures_were_measured():
    rows = [*word_problems(num_rows=20_000), *word_problems(num_rows=256, split="validation")]
    digest = hashlib.sha256("\n".join(text for row in rows for text in row.values()).encode()).hexdigest()
    assert digest == "94b8fff5a9675d76716986ff0d4e86c0ca854b23f15c134a410a4f92500b0caf"


def test_train_and_validation_share_no_prompt_and_no_solution(problems):
    validation = word_problems(num_rows=2000, seed=4, split="validation")[:]
    assert not set(problems["prompt"]) & set(validation["prompt"])
    assert not set(problems["output"]) & set(validation["output"])


def test_what_says_no_rows_of_a_split_is_refused():
    with pytest.raises(ValueError, match="`split` is 'test', expected one of train, validation"):
        word_problems(num_rows=1, split="test")
    with pytest.raises(ValueError, match="`num_rows` is 0, expected at least 1"):
        story_questions(num_rows=0)
    with pytest.raises(TypeError, match=r"`num_rows` is 2.5 of type float, expected a whole number"):
        word_problems(num_rows=2.5)


def test_equations_are_right_and_end_in_the_ground_truth(problems):
    for output, ground_truth in zip(problems["output"], problems["ground_truth"], strict=True):
        equations, answer = re.fullmatch(r" (.*) </think> <answer> (\d+) </answer>", output).groups()
        results = []
        for equation in equations.split(" ; "):
            left, sign, right, _, result = equation.split(" ")
            assert OPERATORS[sign](int(left), int(right)) == int(result), equation
            assert not results or results[-1] == left
            results.append(result)
        assert len(results) == 2
        assert results[-1] == answer == ground_truth


def test_prompts_tell_the_story_of_the_equations(problems):
    for prompt, output in zip(problems["prompt"], problems["output"], strict=True):
        start, first, second = re.fullmatch(r"User: (.*), (.*), then (.*)\. How .* Assistant: <think>", prompt).groups()
        told = [re.search(r"\d+", start)[0]]
        for change in (first, second):
            told += ["+" if change.split()[0] in ADDING else "-", re.search(r"\d+", change)[0]]
        left, sign1, n1, _, _, _, _, sign2, n2, *_ = output.split()
        assert told == [left, sign1, n1, sign2, n2]


def test_all_numbers_to_30_occur_and_no_other(problems):
    assert set(re.findall(r"-?\d+", " ".join(problems["output"]))) == {str(number) for number in range(31)}


def test_vocabulary_has_the_size_that_configs_state(tokenizer):
    assert len(tokenizer) == 83
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_special_tokens_are_distinct(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3


@pytest.mark.parametrize("column", ["prompt", "output"])
def test_decoding_gives_every_text_back(problems, tokenizer, column):
    ids = tokenizer(problems[column], add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert tokenizer.batch_decode(ids) == problems[column]


def test_every_token_is_used_but_the_special_ones(problems, tokenizer):
    ids = tokenizer(problems["prompt"] + problems["output"])["input_ids"]
    assert set(range(len(tokenizer))) - set().union(*ids) == set(tokenizer.all_special_ids)


def test_a_number_is_one_token(tokenizer):
    tokens = tokenizer.tokenize(" 12 + 7 = 19 ; 19 - 5 = 14 </think> <answer> 14 </answer>")
    assert tokens == [
        *(" 12", " +", " 7", " =", " 19", " ;", " 19", " -", " 5", " =", " 14"),
        *(" </think>", " <answer>", " 14", " </answer>"),
    ]


def test_library_tokenisation_is_that_of_the_whole_text_and_the_response_decodes_alone(problems, tokenizer):
    prompts, outputs = problems["prompt"], problems["output"]
    examples = encode_examples(prompts, outputs, tokenizer, append_eos=True)
    for prompt, output, example in list(zip(prompts, outputs, examples, strict=True))[:100]:
        assert example.input_ids == [*tokenizer(prompt + output)["input_ids"], tokenizer.eos_token_id]
        response = example.input_ids[example.num_prompt_tokens :] + [tokenizer.pad_token_id] * 3
        assert tokenizer.decode(response, skip_special_tokens=True) == output


def test_foreign_words_become_the_unknown_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("User: Zoe has")["input_ids"]) == ["User:", "<unk>", " has"]


def test_batches_hold_what_a_causal_model_takes(tokenizer):
    assert set(tokenizer("User:")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("function", "result"), [(word_problems, Dataset), (word_tokenizer, PreTrainedTokenizerFast)])
def test_return_types_are_classes_that_a_config_can_be_checked_against(function, result):
    assert inspect.signature(function).return_annotation is result


def test_answers_to_stories_are_in_the_story_and_rewarded():
    rows = story_questions(300, seed=1)
    assert rows[:] == story_questions(300, seed=1)[:]
    assert len(set(rows["ground_truth"])) > 20
    asked = {"Who found it?": 0, "What was it?": 1, "Where was it?": 2, "Who did not find it?": 3}
    for row in rows.select(range(60)):
        words = re.fullmatch(r" (\w+) found a (\w+) in the (\w+), not (\w+)\. </think> .*", row["output"]).groups()
        assert all(re.search(rf"\b{word}\b", row["prompt"]) for word in words)
        (index,) = [index for question, index in asked.items() if f" {question} <think>" in row["prompt"]]
        assert words[index] == row["ground_truth"]
        assert r1_zero_reward(row["output"], row["ground_truth"])["reward"] == 1.0


def test_the_splits_of_stories_share_no_solution_whatever_is_asked():
    """7,200 solutions are possible (10 x 9 people, 10 things, 8 places): 8,000 rows would meet many of 2,000 others."""
    train, validation = story_questions(8000)["output"], story_questions(2000, split="validation")["output"]
    solutions = [{output.split(" </think>")[0] for output in outputs} for outputs in (train, validation)]
    assert solutions[0].isdisjoint(solutions[1])
    assert len(solutions[1]) > 100
