"""Rows of a file made into token ids: this package beside TRL's `SFTTrainer`, with one process and with several.

    pip install -e '.[bench]'
    python tests/benchmarks/tokenization.py --data ../shared/data/gsm8k/train.jsonl --tokenizer path/to/qwen2/tokenizer

Both read GSM8K rows from JSON lines and put them under the `r1_zero` prompt. Ours checks, tokenises and counts them,
and writes them to its cache; TRL's trainer is built over them, with a model of a few weights. Processor time is that of
all processes together: a fast tokenizer has threads of its own, so one process may keep more than one core busy.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from measure import in_turn, machine, table

import lightning_sft

Numbers = dict[str, float]


@contextmanager
def timed(numbers: Numbers) -> Iterator[None]:
    """Seconds on the clock, and of processors, child processes included."""
    clock, before = time.perf_counter(), os.times()
    yield
    after = os.times()
    numbers |= {"seconds": time.perf_counter() - clock, "processor": sum(after[:4]) - sum(before[:4])}


def prompt_template() -> str:
    import yaml

    configs = Path(lightning_sft.__file__).parents[1] / "configs"
    template: str = yaml.safe_load((configs / "gsm8k.yaml").read_text())["data"]["prompt_template"]
    return template


def ours(data: Path, tokenizer: str, num_proc: int) -> Numbers:
    import datasets

    from lightning_sft import SFTDataModule
    from lightning_sft.examples import r1_zero_row

    numbers: Numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        options = {"row_transform": r1_zero_row, "prompt_template": prompt_template(), "num_proc": num_proc}
        datamodule = SFTDataModule(tokenizer, str(data), **options)
        assert datamodule.tokenizer is not None  # loaded before
        with timed(numbers):
            datamodule.setup("fit")
    return numbers


def trl(data: Path, tokenizer: str, num_proc: int) -> Numbers:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    numbers: Numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        from trl import SFTConfig, SFTTrainer

        from lightning_sft.examples import r1_zero_row

        loaded, template = AutoTokenizer.from_pretrained(tokenizer), prompt_template()

        def pair(row: dict[str, Any]) -> dict[str, str]:
            return {"prompt": template.format(**row), "completion": r1_zero_row(row)["output"]}

        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
        config = Qwen2Config(vocab_size=len(loaded), num_hidden_layers=1, **sizes)
        model = AutoModelForCausalLM.from_config(config)
        options = {"dataset_num_proc": num_proc, "max_length": None, "use_cpu": True, "bf16": False}
        settings = SFTConfig(output_dir=folder, report_to="none", **options)
        with timed(numbers):
            rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=folder)
            rows = rows.map(pair, remove_columns=rows.column_names, num_proc=num_proc if num_proc > 1 else None)
            SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=loaded)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K as JSON lines of `question` and `answer`")
    parser.add_argument("--tokenizer", required=True, help="a name or a folder")
    parser.add_argument("--copies", type=int, default=8, help="how many times the rows come")
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lines = [line for line in options.data.read_text(encoding="utf-8").splitlines() if json.loads(line)]
    contestants: dict[str, Callable[..., Numbers]] = {
        f"{name}, {num_proc} process{'es' if num_proc > 1 else ''}": partial(contestant, num_proc=num_proc)
        for num_proc in options.num_proc
        for name, contestant in (("`lightning_sft`", ours), ("TRL", trl))
    }
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        data.write_text("".join(f"{line}\n" for line in lines * options.copies), encoding="utf-8")
        arguments = {"data": data, "tokenizer": options.tokenizer}
        _, results = in_turn(contestants, arguments, options.rounds, dtype="float32")
    print(f"{machine('cpu')}\n\n{len(lines) * options.copies:,} rows, medians of {options.rounds} rounds\n")
    rows = [
        [name, *(f"{result[key]:.1f} s" for key in ("seconds", "processor"))]
        if "error" not in result
        else [name, result["error"], ""]
        for name, result in results.items()
    ]
    print(table(["", "time", "of processors"], rows))


if __name__ == "__main__":
    main()
