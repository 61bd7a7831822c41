"""Training steps side by side: this package, plain PyTorch as the course's text has it, and TRL's `SFTTrainer`.

    pip install -e '.[bench]'
    python tests/benchmarks/train.py --data ../shared/data/gsm8k/train.jsonl

Every contestant trains the same model on the same GSM8K rows under the `r1_zero` prompt, in the same steps of 32
sequences (TRL's length groups and packs draw their own) with the same AdamW, each in a process of its own, in turn.
Rates are of prompt and response tokens, without padding. Useful arithmetic is that of every token through the body,
of every response token through the head, and of causal attention counted once, forward and backward.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import GIB, PeakMemory, in_turn, machine, peak_rate, table

BATCH_SIZE, WARMUP_STEPS, LEARNING_RATE = 32, 2, 1e-3
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6}
CASES: dict[str, dict[str, Any]] = {
    "large-vocabulary": {
        "model": {
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "dtype": "float32",
    },
    "small-fp32": {"model": SMALL | {"num_key_value_heads": 2, "vocab_size": 8192}, "dtype": "float32"},
    "small-bf16": {"model": SMALL | {"num_key_value_heads": 2, "vocab_size": 8192}, "dtype": "bfloat16"},
    "0.5b": {
        "model": QWEN
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        "dtype": "bfloat16",
    },
    "1.5b": {
        "model": QWEN
        | {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        "dtype": "bfloat16",
    },
}


# -- what all contestants share ------------------------------------------------------------------------------------


def build_tokenizer(vocab_size: int, rows: list[dict[str, str]], folder: Path) -> None:
    """The Qwen2 tokenizer for its vocabulary, otherwise a byte-level BPE trained on the rows."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if vocab_size > 100_000:
        AutoTokenizer.from_pretrained(folder.parent / "qwen2_tokenizer").save_pretrained(folder / "tokenizer")
        return
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        (row["prompt"] + row["output"] for row in rows), vocab_size, special_tokens=["<eos>"], show_progress=False
    )
    bpe.save(str(folder / "bpe.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "bpe.json"), eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder / "tokenizer")


def read_rows(data: Path) -> list[dict[str, str]]:
    import yaml

    from lightning_sft.examples import r1_zero_row

    config = Path(__file__).parents[2] / "configs" / "gsm8k.yaml"
    template = yaml.safe_load(config.read_text())["data"]["prompt_template"]
    rows = [r1_zero_row(json.loads(line)) for line in data.read_text().splitlines()]
    return [{"prompt": template.format(question=row["question"]), "output": row["output"]} for row in rows]


def build_model(case: str, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"model_type": "qwen2", "tie_word_embeddings": True} | CASES[case]["model"]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, CASES[case]["dtype"])).to(device)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def encoded(folder: Path) -> list[dict[str, list[int]]]:
    return json.loads((folder / "encoded.json").read_text())


class Clock:
    """Seconds and tokens of the steps after the warm-up; losses of all; memory beyond the weights."""

    def __init__(self, device: str) -> None:
        self.device, self.losses, self.times, self.tokens = device, [], [], []
        self._peak = PeakMemory(device)

    def step_done(self, loss: float, num_tokens: int) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.losses.append(loss)
        self.tokens.append(num_tokens)

    def result(self) -> dict[str, float]:
        elapsed = self.times[-1] - self.times[WARMUP_STEPS - 1]
        return {
            "tokens_per_second": sum(self.tokens[WARMUP_STEPS:]) / elapsed,
            "bytes": self._peak.read(),
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
        }


# -- the contestants -----------------------------------------------------------------------------------------------


def ours(
    folder: Path,
    case: str,
    device: str,
    num_steps: int,
    layout: str = "packed",
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> dict:
    import lightning as L

    from lightning_sft import SFTDataModule, SFTModule

    class StepDone(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = float(trainer.callback_metrics["train/loss"])
            clock.step_done(loss, batch.totals.num_tokens + batch.totals.num_sequences)

    data = SFTDataModule(
        str(folder / "tokenizer"),
        str(folder / "rows.jsonl"),
        batch_size=BATCH_SIZE,
        layout=layout,
        max_tokens_per_microbatch=options.pop("max_tokens_per_microbatch", None),
    )
    module = SFTModule(
        build_model(case, "cpu"),
        optimizer=adamw,
        lr_scheduler="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        **options,
    )
    precision = "32-true" if CASES[case]["dtype"] == "float32" else "bf16-true"
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_steps=num_steps,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[StepDone(), *callbacks],
    )
    clock = Clock(device)
    trainer.fit(module, data)
    return clock.result()


def ours_compiled(**arguments: Any) -> dict:
    return ours(**arguments, compile=True)


def plain_padded(folder: Path, case: str, device: str, num_steps: int) -> dict:
    """Right-padded batches, logits of every position, cross-entropy where there is a response."""
    model = build_model(case, device).train()
    optimizer = adamw(model.parameters())
    examples = encoded(folder)
    clock = Clock(device)
    for step in range(num_steps):
        chosen = examples[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        longest = max(len(example["input_ids"]) for example in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels = torch.full((len(chosen), longest), -100)
        for row, example in enumerate(chosen):
            ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
            labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
        ids, labels = ids.to(device), labels.to(device)[:, 1:]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        mask = labels != -100
        log_p = torch.log_softmax(logits.float(), dim=-1)
        log_probs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
            (entropy * mask).sum() / mask.sum()
        loss = -(log_probs * mask).sum() / mask.sum()
        del logits, log_p
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_done(loss.item(), sum(len(example["input_ids"]) for example in chosen))
    return clock.result()


def trl(folder: Path, case: str, device: str, num_steps: int, **settings: Any) -> dict:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen = {"tokens": 0, "loss": 0.0}

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            seen["tokens"] += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            seen["loss"] += float(loss)
            return loss

    class StepDone(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step_done(seen["loss"], seen["tokens"])
            seen.update(tokens=0, loss=0.0)

    options = {
        "output_dir": str(folder / "trl"),
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_length": 1024,
        "bf16": False,
        "use_cpu": device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": num_steps,
        "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda",
    } | settings
    trainer = Counting(
        model=build_model(case, device),
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(encoded(folder)),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        callbacks=[StepDone()],
    )
    clock = Clock(device)
    trainer.train()
    return clock.result()


def trl_without_checkpointing(**arguments: Any) -> dict:
    return trl(**arguments, gradient_checkpointing=False)


def trl_grouped(**arguments: Any) -> dict:
    return trl(**arguments, gradient_checkpointing=False, train_sampling_strategy="group_by_length")


def trl_packed(**arguments: Any) -> dict:
    """Bins of 1,024 tokens, as many as hold about 32 sequences."""
    lengths = [len(example["input_ids"]) for example in encoded(arguments["folder"])]
    bins = max(1, round(BATCH_SIZE * sum(lengths) / len(lengths) / 1024))
    settings = {"packing": True, "per_device_train_batch_size": bins}
    return trl(**arguments, gradient_checkpointing=False, **settings)


def ours_padded(**arguments: Any) -> dict:
    return ours(**arguments, layout="padded")


CONTESTANTS: dict[str, Callable[..., dict]] = {
    "ours": ours,
    "ours, padded": ours_padded,
    "ours, compiled": ours_compiled,
    "plain PyTorch, padded": plain_padded,
    "TRL, defaults": trl,
    "TRL, no checkpointing": trl_without_checkpointing,
    "TRL, grouped by length": trl_grouped,
    "TRL, packed": trl_packed,
}


# -- the contest ---------------------------------------------------------------------------------------------------


def useful_flops_per_token(case: str, examples: list[dict[str, list[int]]]) -> float:
    """Of a training step, by hand: see the first lines of this file."""
    model = CASES[case]["model"]
    hidden, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_hidden_layers"]
    heads = model["num_attention_heads"]
    key_value = hidden // heads * model["num_key_value_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner)
    tokens = sum(len(example["input_ids"]) for example in examples)
    responses = sum(label != -100 for example in examples for label in example["labels"])
    pairs = sum(len(example["input_ids"]) * (len(example["input_ids"]) + 1) / 2 for example in examples)
    return (6 * weights * tokens + 6 * hidden * model["vocab_size"] * responses + 12 * layers * hidden * pairs) / tokens


def prepare(case: str, data: Path, folder: Path, num_steps: int) -> list[dict[str, list[int]]]:
    """Rows, tokenizer and, in the order of our steps, the token ids."""
    from transformers import AutoTokenizer

    from lightning_sft.data.steps.plan import BatchPlan, StepRule
    from lightning_sft.data.tokens.tokenization import encode_examples

    rows = read_rows(data)
    (folder / "qwen2_tokenizer").symlink_to((data.parents[1] / "qwen2_tokenizer").resolve())
    build_tokenizer(CASES[case]["model"]["vocab_size"], rows, folder / "case")
    rows = rows[: BATCH_SIZE * num_steps]
    (folder / "case" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(folder / "case" / "tokenizer")
    prompts, outputs = [row["prompt"] for row in rows], [row["output"] for row in rows]
    examples = encode_examples(prompts, outputs, tokenizer, append_eos=True)
    plan = BatchPlan([1] * len(rows), [1] * len(rows), StepRule(BATCH_SIZE))
    order = [index for step in range(num_steps) for index in plan.step(step).ranks[0][0]]
    chosen = []
    for example in (examples[index] for index in order):
        labels = [-100] * example.num_prompt_tokens + list(example.input_ids[example.num_prompt_tokens :])
        chosen.append({"input_ids": list(example.input_ids), "labels": labels})
    (folder / "case" / "encoded.json").write_text(json.dumps(chosen))
    return chosen


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    shown = {name: result for name, result in results.items() if "error" not in result}
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.45 * len(shown) + 1.2), layout="constrained", sharey=True)
    for axis, key, scale, label in ((axes[0], "tokens_per_second", 1, "tokens/s"), (axes[1], "bytes", GIB, "peak GiB")):
        bars = axis.barh(list(shown), [result[key] / scale for result in shown.values()], color="tab:blue")
        axis.bar_label(bars, fmt="{:,.0f}" if scale == 1 else "{:.2f}", padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl, beside the Qwen2 tokenizer")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["large-vocabulary", "small-fp32", "small-bf16"])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8, help=f"optimizer steps; the first {WARMUP_STEPS} are not timed")
    parser.add_argument("--rounds", type=int, default=3, help="times that every contestant is run, in turn")
    parser.add_argument("--plot", type=Path, help="folder for a PNG of each case")
    options = parser.parse_args()
    print(machine(options.device))
    for case in options.case:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "case").mkdir()
            examples = prepare(case, options.data, folder, options.steps)
            arguments = {"folder": folder / "case", "case": case, "device": options.device, "num_steps": options.steps}
            contestants = {name: CONTESTANTS[name] for name in options.contestants}
            rate, results = in_turn(contestants, arguments, options.rounds, CASES[case]["dtype"])
        peak = peak_rate(getattr(torch, CASES[case]["dtype"]), options.device)
        report(case, results, useful_flops_per_token(case, examples), rate, peak)
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            plot(results, case, options.plot / f"{case}.png")


def report(case: str, results: dict[str, dict[str, Any]], flops: float, rate: float, peak: float | None = None) -> None:
    header = ["", "tokens/s", "ours is", "peak GiB", "ours takes", "of the GEMM rate", "first loss", "last loss"]
    header += [] if peak is None else ["MFU"]
    best = results.get("ours", {})
    lines = []
    for name, result in results.items():
        if "error" in result:
            lines.append([name, result["error"], *[""] * (len(header) - 2)])
            continue
        lines.append(
            [
                name,
                f"{result['tokens_per_second']:,.0f}",
                f"{best['tokens_per_second'] / result['tokens_per_second']:.2f}x" if best else "",
                f"{result['bytes'] / GIB:.2f}",
                f"{best['bytes'] / result['bytes']:.2f}x" if best else "",
                f"{result['tokens_per_second'] * flops / rate:.0%}",
                f"{result['first_loss']:.4f}",
                f"{result['last_loss']:.4f}",
                *([] if peak is None else [f"{result['tokens_per_second'] * flops / peak:.1%}"]),
            ]
        )
    print(f"\n{case}: {flops / 1e6:,.1f} MFLOP/token, GEMM {rate / 1e9:,.0f} GFLOP/s\n")
    print(table(header, lines), flush=True)


if __name__ == "__main__":
    main()
