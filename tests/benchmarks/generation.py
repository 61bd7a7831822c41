"""Generation in the loop: `log_generations` beside plain `model.generate`, without log-probabilities.

    python tests/benchmarks/generation.py --model FOLDER [--prompts 128] [--new-tokens 128] [--stop TEXT]

The prompts are of 3 to 60 words. Responses end at EOS, with `--stop`, or after `--new-tokens`.
"""

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sft import Sampling, exact_match_reward, log_generations

_STORY = "once upon a time there was little girl named lily who had big red ball and she liked to play in the park"


def prompts_of(number: int) -> list[str]:
    """Prompts of 3 to 60 words."""
    drawn = random.Random(0)
    return [" ".join(drawn.choices(_STORY.split(), k=drawn.randint(3, 60))) for _ in range(number)]


def load(model: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return AutoModelForCausalLM.from_pretrained(model).to(device).eval(), AutoTokenizer.from_pretrained(model)


def timed(function: Callable[[], int], device: str) -> dict[str, float]:
    """Of the second call of two: the seconds, those of the processor, and the tokens that it generated."""
    function()
    counted: list[int] = []
    begun = time.process_time()
    seconds = measure.seconds(lambda: counted.append(function()), device)
    return {"seconds": seconds, "processor": time.process_time() - begun, "tokens": float(counted[0])}


def ours(model: str, prompts: int, new_tokens: int, stop: str | None, device: str) -> dict[str, float]:
    """Responses, log-probabilities, entropies and rewards."""
    loaded, tokenizer = load(model, device)
    texts, sampling = prompts_of(prompts), Sampling(new_tokens, stop_strings=stop and [stop])

    def run() -> int:
        records, _ = log_generations(loaded, tokenizer, texts, [""] * prompts, exact_match_reward, sampling=sampling)
        return sum(record.response_length for record in records)

    return timed(run, device)


def plain(model: str, prompts: int, new_tokens: int, stop: str | None, device: str) -> dict[str, float]:
    """All prompts in one batch of `model.generate`, and nothing else."""
    loaded, tokenizer = load(model, device)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = tokenizer(prompts_of(prompts), return_tensors="pt", padding=True).to(device)

    def run() -> int:
        with torch.inference_mode():
            output = loaded.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, stop_strings=stop, tokenizer=tokenizer,
            )  # fmt: skip
        ended = (output[:, batch["input_ids"].shape[1] :] == tokenizer.eos_token_id).int()
        lengths = torch.where(ended.any(dim=1), ended.argmax(dim=1) + 1, ended.shape[1])
        return int(lengths.sum())

    return timed(run, device)


CONTESTANTS = {"ours": ours, "plain generate": plain}


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--stop")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    given = vars(parser.parse_args())
    rounds = given.pop("rounds")
    _, results = measure.in_turn(CONTESTANTS, given, rounds, "float32")
    print(f"{measure.machine(given['device'])}, medians of {rounds} rounds\n")
    rows = [[name, *((result.get("error") and [result["error"]]) or [f"{value:,.2f}" for value in result.values()])]
            for name, result in results.items()]  # fmt: skip
    print(measure.table(["", "seconds", "of processor time", "tokens"], rows))


if __name__ == "__main__":
    main()
