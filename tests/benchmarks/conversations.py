"""Conversations under the public chat templates of `trl`: what becomes of rows of each shape, and how long it takes."""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.templates import FOLDER, NAMES, SHAPES, TOOLS, template_tokenizer

from lightning_sft.data.chat.chat_encoding import ChatEncoder
from lightning_sft.data.chat.conversation import read_conversation
from lightning_sft.data.encoded_rows import encode_rows
from lightning_sft.data.encoding import Encoding, RowEncoder
from lightning_sft.data.rows.row_format import RowFormat
from lightning_sft.data.rows.sources import open_sources
from lightning_sft.errors import SettingsError

_HEAD = """# Conversations under public chat templates

The result for a row of each shape under the {num_templates} templates of `trl`, with `train_on_turns: all`: the number
of examples that it becomes, or the field that the template leaves out, for which the row is refused. Notes:

- `prompt`: the generation prompt holds more than the text before a turn; the response begins where the two differ.
- `end`: no special token ends a turn, so EOS does.
- `reasoning`: the template leaves out a part of the content, such as its reasoning.

Written by `python tests/benchmarks/conversations.py > tests/benchmarks/templates.md`;
`tests/data/chat/test_public_templates.py` checks each of these rows, plain and streamed.

"""


def outcome(tokenizer: PreTrainedTokenizerBase, shape: str) -> str:
    """What becomes of a row: the number of its examples and what is to be known of them, or why it is refused."""
    row = {"messages": SHAPES[shape], "tools": TOOLS if shape.startswith("tools") else None}
    encoder = ChatEncoder(tokenizer)
    try:
        written = encoder.write(read_conversation(row, ["messages"]))
        notices = set()
        for encoded in encoder.encode(written):
            if isinstance(encoded, SettingsError):
                raise encoded
            notices |= {notice.kind for notice in encoded.notices}
    except SettingsError as error:
        words = str(error)
        return "refused: " + (words.split("`")[1] if "does not write" in words else "template raises")
    return ", ".join([str(len(written)), *sorted(notices)])


def table() -> str:
    """A line for each template, a column for each shape of rows, and what they mean."""
    lines = [["template", *SHAPES], ["---"] * (len(SHAPES) + 1)]
    for name in NAMES:
        tokenizer = template_tokenizer(name)
        lines.append([name, *(outcome(tokenizer, shape) for shape in SHAPES)])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return _HEAD.format(num_templates=len(NAMES)) + rows


def made_up_rows(num_rows: int, num_turns: int) -> list[dict[str, object]]:
    """Conversations of turns of 5 to 40 words."""
    draw = random.Random(0)
    words = ["a", "few", "words", "of", "any", "kind", "and", "length"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, 40)))

    roles = ["user", "assistant"] * (num_turns // 2)
    return [{"messages": [{"role": role, "content": text()} for role in roles]} for _ in range(num_rows)]


def seconds(contestants: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median of each, all in turn in each round."""
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for contestant, own in zip(contestants, times, strict=True):
            start = time.perf_counter()
            contestant()
            own.append(time.perf_counter() - start)
    return list(map(statistics.median, times))


def race(tokenizer: PreTrainedTokenizerBase, name: str, num_rows: int, rounds: int) -> str:
    """Tokenise conversations of four turns, and mask them: here, and as TRL does, by its template for training."""
    rows = Dataset.from_list(made_up_rows(num_rows, num_turns=4))
    own, of_trl = ((FOLDER / f"{each}.jinja").read_text() for each in (name, f"{name}_training"))

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder)
            tokenizer.chat_template = own
            encoder = RowEncoder(RowFormat(), tokenizer, Encoding())
            encode_rows(open_sources(rows, "train_data"), encoder, num_proc=1)

    def trl() -> None:
        def tokenise(row: dict[str, list[dict[str, str]]]) -> dict[str, list[int]]:
            encoded = tokenizer.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=True
            )
            return {name: encoded[name] for name in ("input_ids", "assistant_masks")}

        tokenizer.chat_template = of_trl
        rows.map(tokenise, load_from_cache_file=False)

    here, there = seconds([ours, trl], rounds)
    return f"| {name} | {num_rows:,} of 4 turns | {here:.1f} s | {there:.1f} s | {here / there:.2f} |"


def long_conversation(tokenizer: PreTrainedTokenizerBase, name: str, rounds: int) -> str:
    """Write and tokenise one conversation of 400 turns."""
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    (row,) = made_up_rows(1, num_turns=400)
    conversation, encoder = read_conversation(row, ["messages"]), ChatEncoder(tokenizer)
    write, both = seconds(
        [lambda: encoder.write(conversation), lambda: list(encoder.encode(encoder.write(conversation)))], rounds
    )
    return f"| {name} | {len(encoder.write(conversation))} | {write:.2f} s | {both - write:.2f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", help="name or folder of a tokenizer: measure times; without it, print the table")
    parser.add_argument("--templates", nargs="+", default=["qwen2_5", "qwen3"], help="which templates are timed")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.tokenizer is None:
        print(table())
        return
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    print("| template | rows | ours | TRL's masks | ours takes |\n| --- | --- | --- | --- | --- |")
    for name in arguments.templates:
        print(race(tokenizer, name, arguments.rows, arguments.rounds), flush=True)
    print("\n| template | examples | 400 turns written | tokenised |\n| --- | --- | --- | --- |")
    for name in arguments.templates:
        print(long_conversation(tokenizer, name, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
