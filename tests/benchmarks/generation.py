"""Generation in the loop: `log_generations` beside plain `model.generate`, without log-probabilities.

    python tests/benchmarks/generation.py --model FOLDER [--prompts 128] [--new-tokens 128] [--stop TEXT]
    python tests/benchmarks/generation.py --case 0.5b --model FOLDER_OF_A_TOKENIZER --words 256 256 --device cuda

By default the prompts are of 3 to 60 words. Responses end at EOS, with `--stop`, or after `--new-tokens`.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from train import CASES, Contest, build_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_sft import Sampling, exact_match_reward, log_generations

_STORY = "once upon a time there was little girl named lily who had big red ball and she liked to play in the park"


class Loaded(NamedTuple):
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Task:
    """What is asked of each contestant.

    Attributes:
        model: Folder of a model and its tokenizer; of a tokenizer alone where there is a case.
        case: Shapes of train.py, with random weights in bfloat16.
        prompts: How many.
        words: The fewest and the most of a prompt.
        new_tokens: The most of a response.
        stop: Text that ends a response.
        device: `cuda` or `cpu`.
    """

    model: str
    case: str | None
    prompts: int
    words: tuple[int, int]
    new_tokens: int
    stop: str | None
    device: str

    def texts(self) -> list[str]:
        """The prompts."""
        drawn = random.Random(0)
        return [" ".join(drawn.choices(_STORY.split(), k=drawn.randint(*self.words))) for _ in range(self.prompts)]

    def load(self) -> Loaded:
        """Model and tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
        if self.case is None:
            return Loaded(AutoModelForCausalLM.from_pretrained(self.model).to(self.device).eval(), tokenizer)
        model = build_model(Contest(Path(), self.case, self.device, 0)).to(torch.bfloat16).eval()
        return Loaded(model, tokenizer)


def timed(function: Callable[[], int], device: str) -> dict[str, float]:
    """Of the second call of two: the seconds, those of the processor, and the tokens that it generated."""
    function()
    counted: list[int] = []
    begun = time.process_time()
    seconds = measure.seconds(lambda: counted.append(function()), device)
    return {"seconds": seconds, "processor": time.process_time() - begun, "tokens": float(counted[0])}


def ours(task: Task) -> dict[str, float]:
    """Responses, log-probabilities, entropies and rewards."""
    loaded, texts = task.load(), task.texts()
    sampling = Sampling(task.new_tokens, stop_strings=task.stop and [task.stop])

    def run() -> int:
        references = [""] * len(texts)
        records, _ = log_generations(*loaded, texts, references, exact_match_reward, sampling=sampling)
        return sum(record.response_length for record in records)

    return timed(run, task.device)


def plain(task: Task) -> dict[str, float]:
    """All prompts in one batch of `model.generate`, and nothing else."""
    model, tokenizer = task.load()
    batch = tokenizer(task.texts(), return_tensors="pt", padding=True).to(task.device)

    def run() -> int:
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=task.new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                stop_strings=task.stop,
                tokenizer=tokenizer,
            )
        ended = (output[:, batch["input_ids"].shape[1] :] == tokenizer.eos_token_id).int()
        lengths = torch.where(ended.any(dim=1), ended.argmax(dim=1) + 1, ended.shape[1])
        return int(lengths.sum())

    return timed(run, task.device)


def continuous(task: Task) -> dict[str, float]:
    """`model.generate_batch`, the continuous batching of `transformers`, and nothing else."""
    model, tokenizer = task.load()
    prompts = [tokenizer(text)["input_ids"] for text in task.texts()]
    settings = GenerationConfig(
        max_new_tokens=task.new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def run() -> int:
        outputs = model.generate_batch(prompts, generation_config=settings, progress_bar=False)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return timed(run, task.device)


CONTESTANTS = {"ours": ours, "plain generate": plain, "generate_batch": continuous}


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--words", type=int, nargs=2, default=(3, 60), metavar=("FEWEST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--stop")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=["ours", "plain generate"])
    given = vars(parser.parse_args())
    rounds, names = given.pop("rounds"), given.pop("contestants")
    task = Task(**given)
    contestants = {name: CONTESTANTS[name] for name in names}
    dtype = "float32" if task.case is None else "bfloat16"
    _, results = measure.in_turn(contestants, {"task": task}, rounds, dtype, task.device)
    print(f"{measure.machine(task.device)}, medians of {rounds} rounds\n")
    rows = [[name, *((result.get("error") and [result["error"]]) or [f"{value:,.2f}" for value in result.values()])]
            for name, result in results.items()]  # fmt: skip
    print(measure.table(["", "seconds", "of processor time", "tokens"], rows))


if __name__ == "__main__":
    main()
