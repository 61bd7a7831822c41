"""Rows that need no network: word problems with a tokenizer of their own, and questions about stories."""

import random
import re
import zlib
from collections.abc import Callable
from typing import Literal, get_args

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_sft.errors import SettingsError

Split = Literal["train", "validation"]

_LARGEST_NUMBER = 30  # sums up to 99 take a tiny model many more optimizer steps
_LARGEST_CHANGE = 10

_NAMES = ("Ava", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_THINGS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")
_GAINS = ("buys {n} more", "finds {n} more", "wins {n} more", "gets {n} from {friend}", "borrows {n} from {friend}")
_LOSSES = ("loses {n}", "sells {n}", "drops {n}", "gives {n} to {friend}", "lends {n} to {friend}")

_PROMPT = (
    "User: {name} has {start} {thing}, {first}, then {second}. "
    "How many {thing} does {name} have now? Assistant: <think>"
)
_OUTPUT = " {start} {sign1} {n1} = {middle} ; {middle} {sign2} {n2} = {end} </think> <answer> {end} </answer>"

_PEOPLE = ("Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Sam", "Anna", "Tim", "Jane")
_FINDS = ("ball", "doll", "car", "hat", "book", "cake", "toy", "box", "bird", "flower")
_PLACES = ("park", "garden", "house", "forest", "box", "tree", "room", "kitchen")
_STORIES = (
    "One day, {finder} found a {thing} in the {place}. {other} wanted to play too.",
    "{other} was sad. Then {finder} went to the {place} and found a {thing}.",
    "{finder} and {other} were in the {place}. {finder} saw a {thing}.",
)
_QUESTIONS = (
    ("Who found it?", "finder"),
    ("What was it?", "thing"),
    ("Where was it?", "place"),
    ("Who did not find it?", "other"),
)

_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
_TOKEN = r" ?[^ .,?]+|[.,?]"  # a word with the space before it, or a mark: joining tokens gives the text back


def word_problems(num_rows: int = 20_000, seed: int = 0, split: Split = "train") -> Dataset:
    """Generate two-step word problems with worked solutions, in the manner of the `r1_zero` prompt.

    The two splits share no solution and therefore no prompt: a checksum of the solution alone decides to which
    split it belongs, whatever the seeds. One solution in ten is for validation.

    Args:
        num_rows: Problems to generate. In a large data set some come twice.
        seed: The same seed gives the same rows on every machine.
        split: Which side of the division of all problems to draw from.

    Returns:
        The columns `prompt`, which ends in `<think>`; `output`, which ends in `<answer> 14 </answer>`; and
        `ground_truth`, such as `"14"`.

    Raises:
        ValueError: If `split` has another value.
    """
    return _draw_rows(_draw_problem, num_rows, seed, split)


def story_questions(num_rows: int = 8_000, seed: int = 0, split: Split = "train") -> Dataset:
    """Generate questions about two-sentence stories, with answers in the format of the `r1_zero` prompt.

    The words are those of TinyStories. As in `word_problems`, the two splits share nothing, however it is asked about.

    Args:
        num_rows: Questions to generate.
        seed: The same seed gives the same rows on every machine.
        split: Which side of the division of all questions to draw from.

    Returns:
        The columns `prompt`, which ends in `<think>`; `output`, which ends in `<answer> Lily </answer>`; and
        `ground_truth`, such as `"Lily"`.

    Raises:
        ValueError: If `split` has another value.
    """
    return _draw_rows(_draw_question, num_rows, seed, split)


def _draw_rows(draw: Callable[[random.Random], dict[str, str] | None], num_rows: int, seed: int, split: str) -> Dataset:
    if split not in get_args(Split):
        raise SettingsError(f'`split` is {split!r}; expected "train" or "validation".')
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    while len(rows) < num_rows:
        row = draw(rng)
        if row is not None and (zlib.crc32(row["solution"].encode()) % 10 == 0) == (split == "validation"):
            rows.append(row)
    return Dataset.from_dict({column: [row[column] for row in rows] for column in ("prompt", "output", "ground_truth")})


def _draw_question(rng: random.Random) -> dict[str, str]:
    finder, other = rng.sample(_PEOPLE, 2)
    words = {"finder": finder, "other": other, "thing": rng.choice(_FINDS), "place": rng.choice(_PLACES)}
    question, asked = rng.choice(_QUESTIONS)
    story = rng.choice(_STORIES).format(**words)
    solution = f" {finder} found a {words['thing']} in the {words['place']}, not {other}."
    return {
        "prompt": f"{story} {question} <think>",
        "output": f"{solution} </think> <answer> {words[asked]} </answer>",
        "ground_truth": words[asked],
        "solution": solution,
    }


def _draw_problem(rng: random.Random) -> dict[str, str] | None:
    """One random problem, or None if a number on the way is negative or too large."""
    name, friend = rng.sample(_NAMES, 2)
    start, n1, n2 = rng.randint(2, _LARGEST_NUMBER), rng.randint(2, _LARGEST_CHANGE), rng.randint(2, _LARGEST_CHANGE)
    (sign1, first), (sign2, second) = _draw_change(rng), _draw_change(rng)
    middle = start + n1 if sign1 == "+" else start - n1
    end = middle + n2 if sign2 == "+" else middle - n2
    if not (0 <= middle <= _LARGEST_NUMBER and 0 <= end <= _LARGEST_NUMBER):
        return None
    prompt = _PROMPT.format(
        name=name,
        start=start,
        thing=rng.choice(_THINGS),
        first=first.format(n=n1, friend=friend),
        second=second.format(n=n2, friend=friend),
    )
    output = _OUTPUT.format(start=start, sign1=sign1, n1=n1, middle=middle, sign2=sign2, n2=n2, end=end)
    return {"prompt": prompt, "output": output, "ground_truth": str(end), "solution": output}


def _draw_change(rng: random.Random) -> tuple[str, str]:
    sign = rng.choice("+-")
    return sign, rng.choice(_GAINS if sign == "+" else _LOSSES)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the words and numbers of `word_problems`.

    A token carries the space before it, so that decoding is joining: `decode(encode(text)) == text`, for a response
    on its own too. Its vocabulary is closed: `len(word_tokenizer())` is the `vocab_size` of a model for it, and
    every other word becomes `<unk>`.
    """
    texts = [_PROMPT, _OUTPUT, *_GAINS, *_LOSSES, *_NAMES, *_THINGS, "+ -", *map(str, range(_LARGEST_NUMBER + 1))]
    words = [word for word in re.findall(_TOKEN, " ".join(texts)) if "{" not in word]
    tokens = dict.fromkeys([*_SPECIAL_TOKENS, *words])  # without repetitions, in order
    pad, eos, unk = _SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk)
