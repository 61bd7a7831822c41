"""Questions about stories of two sentences, in the words of TinyStories."""

from random import Random

from datasets import Dataset

from lightning_sft.examples.splits import Split, draw_rows

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


def story_questions(num_rows: int = 8_000, seed: int = 0, split: Split = "train") -> Dataset:
    """Generate questions about two-sentence stories, with answers in the format of the `r1_zero` prompt.

    The words are those of TinyStories. As in `word_problems`, the splits share no story, whatever is asked about it.

    Args:
        num_rows: Questions to generate.
        seed: The same seed gives the same rows on every machine.
        split: Split of all questions to draw from.

    Returns:
        The columns `prompt`, which ends in `<think>`; `output`, which ends in `<answer> Lily </answer>`; and
        `ground_truth`, such as `"Lily"`.

    Raises:
        SettingsTypeError: If `num_rows` or `seed` is not a whole number.
        SettingsError: If `num_rows` is below 1, or `split` has another value.
    """
    return draw_rows(_draw_question, num_rows, seed, split)


def _draw_question(random: Random) -> dict[str, str]:
    finder, other = random.sample(_PEOPLE, 2)
    words = {"finder": finder, "other": other, "thing": random.choice(_FINDS), "place": random.choice(_PLACES)}
    question, asked = random.choice(_QUESTIONS)
    story = random.choice(_STORIES).format(**words)
    solution = f" {finder} found a {words['thing']} in the {words['place']}, not {other}."
    return {
        "prompt": f"{story} {question} <think>",
        "output": f"{solution} </think> <answer> {words[asked]} </answer>",
        "ground_truth": words[asked],
        "solution": solution,
    }
