"""Estimated against measured: the peak memory of real training, each in a process of its own.

    python tests/benchmarks/estimate.py [--device cuda]

On CUDA measured is what torch's tensors held at the most. On CPU it is the process's most resident memory above what
it had before the model was built: with a C library that hands every freed block back at once, which is what an estimate
can know of, and as it comes (glibc keeps many).
"""

import argparse
import multiprocessing
import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import GIB, PeakMemory, machine, table
from train import CASES, QWEN

MODELS: dict[str, dict[str, Any]] = {
    "small-fp32": CASES["small-fp32"]["model"],
    "0.14b": QWEN
    | {
        "hidden_size": 512,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "0.5b": CASES["0.5b"]["model"],
    "1.5b": CASES["1.5b"]["model"],
    "7b": QWEN
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
CONTESTS: dict[str, dict[str, Any]] = {
    "small": {"model": "small-fp32"},
    "small, checkpointing": {"model": "small-fp32", "gradient_checkpointing": True},
    "small, padded": {"model": "small-fp32", "layout": "padded"},
    "small, two microbatches": {"model": "small-fp32", "max_tokens_per_microbatch": 3072},
    "small, bf16-mixed": {"model": "small-fp32", "precision": "bf16-mixed", "batch_size": 4},
    "0.14b": {"model": "0.14b", "batch_size": 8, "max_tokens_per_microbatch": 1536},
    "0.14b, checkpointing": {
        "model": "0.14b",
        "batch_size": 8,
        "max_tokens_per_microbatch": 1536,
        "gradient_checkpointing": True,
    },
    "0.14b, SGD": {"model": "0.14b", "batch_size": 8, "max_tokens_per_microbatch": 1536, "optimizer": "sgd"},
}
CUDA_CONTESTS: dict[str, dict[str, Any]] = {
    "0.5b": {"model": "0.5b", "precision": "bf16-mixed", "batch_size": 32, "max_tokens_per_microbatch": 8192},
    "0.5b, checkpointing": {
        "model": "0.5b",
        "precision": "bf16-mixed",
        "batch_size": 128,
        "max_tokens_per_microbatch": 32768,
        "gradient_checkpointing": True,
    },
    "0.5b, bf16-true": {"model": "0.5b", "precision": "bf16-true", "batch_size": 32, "max_tokens_per_microbatch": 8192},
    "1.5b": {"model": "1.5b", "precision": "bf16-mixed", "batch_size": 16, "max_tokens_per_microbatch": 4096},
    "0.5b, LoRA": {
        "model": "0.5b",
        "precision": "bf16-mixed",
        "batch_size": 32,
        "max_tokens_per_microbatch": 8192,
        "lora": {"r": 16},
    },
    "7b, LoRA": {
        "model": "7b",
        "precision": "bf16-true",
        "batch_size": 32,
        "max_tokens_per_microbatch": 8192,
        "gradient_checkpointing": True,
        "lora": {"r": 16, "target_modules": "all-linear"},
        "from_checkpoint": True,  # to draw the weights of so many parameters on the CPU takes minutes
    },
}
CUDA_CONTESTS["7b, LoRA, 4 bits"] = CUDA_CONTESTS["7b, LoRA"] | {
    "model_kwargs": {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}}
}
HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-4)


def parts(
    model: str,
    device: str,
    precision: str = "32-true",
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    batch_size: int = 16,
    lora: dict[str, Any] | None = None,
    folder: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    **data_options: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """Module, data and the trainer's settings; rows of 67 to 547 tokens, about a third of them of responses.

    Weights are drawn, or read from the folder.
    """
    from lightning_sft import SFTDataModule, SFTModule
    from lightning_sft.examples import word_problems, word_tokenizer

    problems = word_problems(2 * batch_size)
    rows = [
        {"prompt": row["prompt"] * (3 + 5 * i % 17), "output": row["prompt"] * (1 + i % 6)}
        for i, row in enumerate(problems)
    ]
    data = SFTDataModule(word_tokenizer(), rows, batch_size=batch_size, **data_options)
    module = SFTModule(
        folder or config_of(model),
        model_kwargs=model_kwargs,
        optimizer={"adamw": adamw, "sgd": sgd}[optimizer],
        lr_scheduler="constant",
        gradient_checkpointing=gradient_checkpointing,
        lora=lora,
    )
    settings = {
        "accelerator": "gpu" if device == "cuda" else "cpu",
        "devices": 1,
        "max_steps": 2,
        "precision": precision,
    }
    return module, data, settings


def config_of(model: str) -> dict[str, Any]:
    return {"model_type": "qwen2", "tie_word_embeddings": True} | MODELS[model]


def save_checkpoint(model: str, device: str, folder: str) -> None:
    """Random weights in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = config_of(model)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measured(sender: Any, settings: dict[str, Any]) -> None:
    import lightning as L

    module, data, options = parts(**settings)
    options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    trainer = L.Trainer(**options, enable_model_summary=False, num_sanity_val_steps=0)
    data.prepare_data()
    peak = PeakMemory(settings["device"])
    trainer.fit(module, data)
    sender.send(peak.read())


def compare(name: str, device: str) -> list[str]:
    settings = (CUDA_CONTESTS if device == "cuda" else CONTESTS)[name] | {"device": device}
    if not settings.pop("from_checkpoint", False):
        return compared(name, settings)
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(
            target=save_checkpoint, args=(settings["model"], device, folder)
        )
        process.start()
        process.join()
        return compared(name, settings | {"folder": folder})


def compared(name: str, settings: dict[str, Any]) -> list[str]:
    from lightning_sft.planning.estimate import estimate_run

    on_cuda = settings["device"] == "cuda"
    module, data, options = parts(**settings)
    estimate = estimate_run(module, data, options)
    expected = estimate.memory[module.checkpointing.gradient_checkpointing].peak
    found = [in_process(settings, variables) for variables in ([{}] if on_cuda else [HANDS_BACK, {}])]
    sizes = [f"{size / GIB:.2f}" for size in (expected, *found)]
    return [name, estimate.run["largest microbatch"], *sizes[:2], f"{expected / found[0]:.2f}", *sizes[2:]]


def in_process(settings: dict[str, Any], variables: dict[str, str]) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(sender, settings))
    os.environ |= variables
    process.start()
    for name in variables:
        del os.environ[name]
    sender.close()
    found = receiver.recv()
    process.join()
    return found


HEADER = ["", "microbatch", "estimated GiB", "measured GiB", "ratio", "measured as it comes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contests", nargs="+", choices=[*CONTESTS, *CUDA_CONTESTS], help="default: all of the device")
    options = parser.parse_args()
    print(machine(options.device))
    on_cuda = options.device == "cuda"
    lines = []
    for name in options.contests or (CUDA_CONTESTS if on_cuda else CONTESTS):
        lines.append(compare(name, options.device))
        print("; ".join(lines[-1]), flush=True)
    print(f"\n{table(HEADER[:5] if on_cuda else HEADER, lines)}")


if __name__ == "__main__":
    main()
