"""Training steps side by side: this package, plain PyTorch as the course's text has it, and TRL's `SFTTrainer`.

    pip install -e '.[bench]'
    python tests/benchmarks/train.py --data ../shared/data/gsm8k/train.jsonl

Every contestant trains the same model on the same GSM8K rows under the `r1_zero` prompt, in the same steps of, by
default, 32 sequences (TRL's length groups and packs draw their own) with the same AdamW, each in a process of its own,
in turn.
Rates are of prompt and response tokens, without padding. Useful arithmetic is that of every token through the body,
of every response token through the head, and of causal attention counted once, forward and backward.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import GIB, PeakMemory, in_turn, machine, peak_rate, table

WARMUP_STEPS, LEARNING_RATE = 2, 1e-3
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
        "precision": "32-true",
    },
    "small-fp32": {"model": SMALL | {"num_key_value_heads": 2, "vocab_size": 8192}, "precision": "32-true"},
    "small-bf16": {"model": SMALL | {"num_key_value_heads": 2, "vocab_size": 8192}, "precision": "bf16-true"},
    "0.5b": {
        "model": QWEN
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        "precision": "bf16-mixed",
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
        "precision": "bf16-mixed",
    },
    "3b-bf16": {
        "model": QWEN
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        "precision": "bf16-true",
    },
}
CASES |= {f"{size}-bf16": CASES[size] | {"precision": "bf16-true"} for size in ("0.5b", "1.5b")}


@dataclass(frozen=True)
class Contest:
    """What all contestants of a case are given.

    Attributes:
        folder: With the rows, their token ids, and the tokenizer.
        case: Name of the model.
        device: `cuda` or `cpu`.
        num_steps: Optimizer steps.
        batch_size: Sequences of an optimizer step.
        num_microbatches: Backward passes of an optimizer step.
        warmup_steps: Optimizer steps that are not timed.
    """

    folder: Path
    case: str
    device: str
    num_steps: int
    batch_size: int = 32
    num_microbatches: int = 1
    warmup_steps: int = WARMUP_STEPS

    @property
    def precision(self) -> str:
        """As Lightning names it."""
        return CASES[self.case]["precision"]

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights and of the optimizer's state."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32


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


def build_model(contest: Contest) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"model_type": "qwen2", "tie_word_embeddings": True} | CASES[contest.case]["model"]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(contest.device):
        return AutoModelForCausalLM.from_config(config, dtype=contest.weight_dtype)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def encoded(folder: Path) -> list[dict[str, list[int]]]:
    return json.loads((folder / "encoded.json").read_text())


class Clock:
    """Seconds and tokens of the steps after the warm-up, losses of the first and the last, memory beyond the weights.

    A CUDA device is not waited for between the first step and the last.
    """

    def __init__(self, contest: Contest) -> None:
        self._contest, self._cuda = contest, contest.device == "cuda"
        self._losses: list[float] = []
        self._tokens: list[torch.Tensor | int] = []
        self._times: list[Any] = []
        self._peak = PeakMemory(contest.device)

    def step_done(self, read_loss: Callable[[], torch.Tensor | float], num_tokens: torch.Tensor | int) -> None:
        if self._cuda:
            self._times.append(torch.cuda.Event(enable_timing=True))
            self._times[-1].record()
        else:
            self._times.append(time.perf_counter())
        self._tokens.append(num_tokens)
        if len(self._times) in (1, self._contest.num_steps):
            self._losses.append(float(read_loss()))

    def result(self) -> dict[str, float]:
        skipped = self._contest.warmup_steps
        first, last = self._times[skipped - 1], self._times[-1]
        if self._cuda:
            torch.cuda.synchronize()
        elapsed = first.elapsed_time(last) / 1000 if self._cuda else last - first
        return {
            "tokens_per_second": float(sum(self._tokens[skipped:])) / elapsed,
            "bytes": self._peak.read(),
            "first_loss": self._losses[0],
            "last_loss": self._losses[-1],
        }


# -- the contestants -----------------------------------------------------------------------------------------------


def ours(contest: Contest, layout: str = "packed", callbacks: Sequence[Any] = (), **options: Any) -> dict:
    import lightning as L

    from lightning_sft import SFTDataModule, SFTModule

    class StepDone(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            totals = batch.totals
            num_tokens = int(totals.num_tokens + totals.num_sequences)
            clock.step_done(lambda: trainer.callback_metrics["train/loss"], num_tokens)

    data = SFTDataModule(
        str(contest.folder / "tokenizer"),
        str(contest.folder / "rows.jsonl"),
        batch_size=contest.batch_size,
        gradient_accumulation_steps=contest.num_microbatches,
        layout=layout,
    )
    module = SFTModule(
        build_model(contest),
        optimizer=adamw,
        lr_scheduler="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        **options,
    )
    trainer = L.Trainer(
        accelerator="gpu" if contest.device == "cuda" else "cpu",
        devices=1,
        max_steps=contest.num_steps,
        precision=contest.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[StepDone(), *callbacks],
    )
    clock = Clock(contest)
    trainer.fit(module, data)
    return clock.result()


def ours_compiled(contest: Contest) -> dict:
    return ours(contest, compile=True)


def ours_checkpointed(contest: Contest) -> dict:
    return ours(contest, gradient_checkpointing=True)


def plain_padded(contest: Contest) -> dict:
    """Right-padded batches, logits of every position, cross-entropy where there is a response."""
    model = build_model(contest).train()
    optimizer = adamw(model.parameters())
    examples, device = encoded(contest.folder), contest.device
    size = contest.batch_size // contest.num_microbatches
    clock = Clock(contest)
    for step in range(contest.num_steps):
        chosen = examples[step * contest.batch_size : (step + 1) * contest.batch_size]
        num_labels = sum(label != -100 for example in chosen for label in example["labels"])
        total = torch.zeros((), device=device)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            longest = max(len(example["input_ids"]) for example in part)
            ids = torch.zeros(len(part), longest, dtype=torch.int64)
            labels = torch.full((len(part), longest), -100)
            for row, example in enumerate(part):
                ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
                labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
            ids, labels = ids.to(device), labels.to(device)[:, 1:]
            with torch.autocast(device, torch.bfloat16, enabled=contest.precision == "bf16-mixed"):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            mask = labels != -100
            log_p = torch.log_softmax(logits.float(), dim=-1)
            log_probs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            with torch.no_grad():
                entropy = -(log_p.exp() * log_p).sum(-1)
                (entropy * mask).sum() / mask.sum()
            loss = -(log_probs * mask).sum() / num_labels
            del logits, log_p
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_done(lambda total=total: total, sum(len(example["input_ids"]) for example in chosen))
    return clock.result()


def trl(contest: Contest, **settings: Any) -> dict:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokens: list[Any] = []
    losses: list[torch.Tensor] = []

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(mask.sum() if mask is not None else inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach().clone())
            return loss

    class StepDone(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step_done(lambda: sum(losses[1:], losses[0]), sum(tokens))
            tokens.clear()
            losses.clear()

    options = {
        "output_dir": str(contest.folder / "trl"),
        "max_steps": contest.num_steps,
        "per_device_train_batch_size": contest.batch_size // contest.num_microbatches,
        "gradient_accumulation_steps": contest.num_microbatches,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_length": 1024,
        "bf16": contest.precision == "bf16-mixed",
        "use_cpu": contest.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": contest.num_steps,
        "disable_tqdm": True,
        "dataloader_pin_memory": contest.device == "cuda",
    } | settings
    trainer = Counting(
        model=build_model(contest),
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(encoded(contest.folder)),
        processing_class=AutoTokenizer.from_pretrained(contest.folder / "tokenizer"),
        callbacks=[StepDone()],
    )
    clock = Clock(contest)
    trainer.train()
    return clock.result()


def trl_without_checkpointing(contest: Contest) -> dict:
    return trl(contest, gradient_checkpointing=False)


def trl_grouped(contest: Contest, **settings: Any) -> dict:
    return trl(contest, gradient_checkpointing=False, train_sampling_strategy="group_by_length", **settings)


def trl_grouped_liger(contest: Contest) -> dict:
    return trl_grouped(contest, use_liger_kernel=True)


def trl_packed(contest: Contest, **settings: Any) -> dict:
    """Bins of 1,024 tokens, as many as hold about as many sequences."""
    lengths = [len(example["input_ids"]) for example in encoded(contest.folder)]
    size = contest.batch_size // contest.num_microbatches
    bins = max(1, round(size * sum(lengths) / len(lengths) / 1024))
    return trl(contest, packing=True, per_device_train_batch_size=bins, gradient_checkpointing=False, **settings)


def trl_packed_liger(contest: Contest) -> dict:
    return trl_packed(contest, use_liger_kernel=True)


def ours_padded(contest: Contest) -> dict:
    return ours(contest, layout="padded")


CONTESTANTS: dict[str, Callable[[Contest], dict]] = {
    "ours": ours,
    "ours, padded": ours_padded,
    "ours, compiled": ours_compiled,
    "ours, checkpointing": ours_checkpointed,
    "plain PyTorch, padded": plain_padded,
    "TRL, defaults": trl,
    "TRL, no checkpointing": trl_without_checkpointing,
    "TRL, grouped by length": trl_grouped,
    "TRL, grouped by length, Liger": trl_grouped_liger,
    "TRL, packed": trl_packed,
    "TRL, packed, Liger": trl_packed_liger,
}
UNUSUAL = ["ours, checkpointing", "TRL, grouped by length, Liger", "TRL, packed, Liger"]  # not run unless named


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


def prepare(contest: Contest, data: Path) -> list[dict[str, list[int]]]:
    """Make the contest's folder: rows, tokenizer and, in the order of our steps, the token ids, which are returned."""
    from transformers import AutoTokenizer

    from lightning_sft.data.steps.plan import BatchPlan, StepRule
    from lightning_sft.data.tokens.tokenization import encode_examples

    rows, folder = read_rows(data), contest.folder
    folder.mkdir()
    (folder.parent / "qwen2_tokenizer").symlink_to((data.parents[1] / "qwen2_tokenizer").resolve())
    build_tokenizer(CASES[contest.case]["model"]["vocab_size"], rows, folder)
    rows = rows[: contest.batch_size * contest.num_steps]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prompts, outputs = [row["prompt"] for row in rows], [row["output"] for row in rows]
    examples = encode_examples(prompts, outputs, tokenizer, append_eos=True)
    plan = BatchPlan([1] * len(rows), [1] * len(rows), StepRule(contest.batch_size))
    order = [index for step in range(contest.num_steps) for index in plan.step(step).ranks[0][0]]
    chosen = []
    for example in (examples[index] for index in order):
        labels = [-100] * example.num_prompt_tokens + list(example.input_ids[example.num_prompt_tokens :])
        chosen.append({"input_ids": list(example.input_ids), "labels": labels})
    (folder / "encoded.json").write_text(json.dumps(chosen))
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
    usual = [name for name in CONTESTANTS if name not in UNUSUAL]
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=usual)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=WARMUP_STEPS, help="of these, the first that are not timed")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of an optimizer step")
    parser.add_argument("--microbatches", type=int, default=1, help="backward passes of an optimizer step")
    parser.add_argument("--rounds", type=int, default=3, help="times that every contestant is run, in turn")
    parser.add_argument("--plot", type=Path, help="folder for a PNG of each case")
    options = parser.parse_args()
    print(machine(options.device))
    for case in options.case:
        dtype = "float32" if CASES[case]["precision"] == "32-true" else "bfloat16"
        with tempfile.TemporaryDirectory() as temporary:
            contest = Contest(
                Path(temporary) / "case",
                case,
                options.device,
                options.steps,
                options.batch_size,
                options.microbatches,
                options.warmup,
            )
            examples = prepare(contest, options.data)
            contestants = {name: CONTESTANTS[name] for name in options.contestants}
            rate, results = in_turn(contestants, {"contest": contest}, options.rounds, dtype, options.device)
        peak = peak_rate(getattr(torch, dtype), options.device)
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
