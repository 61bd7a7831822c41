"""Word problems with worked solutions, and a tokenizer whose tokens are their words."""

import re
from random import Random

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_sft.examples.splits import Split, draw_rows

_LARGEST_NUMBER = 30  # sums up to 99 take a tiny model many more optimizer steps
_LARGEST_CHANGE = 10

_NAMES = ("Ava", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_THINGS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps")
_GAINS = ("buys {n} more", "finds {n} more", "wins {n} more", "gets {n} from {friend}", "borrows {n} from {friend}")
_LOSSES = ("loses {n}", "sells {n}", "drops {n}", "gives {n} to {friend}", "lends {n} to {friend}")

_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
_TOKEN = r" ?[^ .,?]+|[.,?]"  # a word with the space before it, or a mark: joining tokens gives the text back


def word_problems(num_rows: int = 20_000, seed: int = 0, split: Split = "train") -> Dataset:
    """Generate two-step word problems with worked solutions, in the format of the `r1_zero` prompt.

    The two splits share no solution and therefore no prompt: a checksum of the solution alone decides the split,
    whatever the seeds. One solution in ten is for validation.

    Args:
        num_rows: Number of problems. A large data set contains some of them twice.
        seed: The same seed gives the same rows on every machine.
        split: Split of all problems to draw from.

    Returns:
        The columns `prompt`, which ends in `<think>`; `output`, which ends in `<answer> 14 </answer>`; and
        `ground_truth`, such as `"14"`.

    Raises:
        SettingsTypeError: If `num_rows` or `seed` is not a whole number.
        SettingsError: If `num_rows` is below 1, or `split` has another value.
    """
    return draw_rows(_draw_problem, num_rows, seed, split)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the words and numbers of `word_problems`.

    A token includes the space before it, so that decoding is concatenation: `decode(encode(text)) == text`, also for a
    response alone. The vocabulary is closed: `len(word_tokenizer())` is the `vocab_size` of a model for it, and every
    other word becomes `<unk>`.
    """
    # With braces in the place of what is filled in: all of that is listed too.
    texts = [_prompt(*["{}"] * 5), _output(*["{}"] * 7), *_GAINS, *_LOSSES, *_NAMES, *_THINGS, "+ -"]
    texts += map(str, range(_LARGEST_NUMBER + 1))
    words = [word for word in re.findall(_TOKEN, " ".join(texts)) if "{" not in word]
    tokens = dict.fromkeys([*_SPECIAL_TOKENS, *words])  # without repetitions, in order
    pad, eos, unk = _SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, unk_token=unk)


def _draw_problem(random: Random) -> dict[str, str] | None:
    """One random problem, or None if a number on the way is negative or too large."""
    name, friend = random.sample(_NAMES, 2)
    start = random.randint(2, _LARGEST_NUMBER)
    n1, n2 = random.randint(2, _LARGEST_CHANGE), random.randint(2, _LARGEST_CHANGE)
    (sign1, first), (sign2, second) = _draw_change(random), _draw_change(random)
    middle = start + n1 if sign1 == "+" else start - n1
    end = middle + n2 if sign2 == "+" else middle - n2
    if not (0 <= middle <= _LARGEST_NUMBER and 0 <= end <= _LARGEST_NUMBER):
        return None
    changes = first.format(n=n1, friend=friend), second.format(n=n2, friend=friend)
    prompt = _prompt(name, start, random.choice(_THINGS), *changes)
    output = _output(start, sign1, n1, middle, sign2, n2, end)
    return {"prompt": prompt, "output": output, "ground_truth": str(end), "solution": output}


def _draw_change(random: Random) -> tuple[str, str]:
    sign = random.choice("+-")
    return sign, random.choice(_GAINS if sign == "+" else _LOSSES)


def _prompt(name: str, start: int | str, thing: str, first: str, second: str) -> str:
    return (
        f"User: {name} has {start} {thing}, {first}, then {second}. "
        f"How many {thing} does {name} have now? Assistant: <think>"
    )


def _output(
    start: int | str, sign1: str, n1: int | str, middle: int | str, sign2: str, n2: int | str, end: int | str
) -> str:
    return f" {start} {sign1} {n1} = {middle} ; {middle} {sign2} {n2} = {end} </think> <answer> {end} </answer>"
