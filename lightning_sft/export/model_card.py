"""Model cards: what a run was trained on, how, and how well it did, in a file that goes with the weights."""

import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TAG = "lightning-sft"


def write_card(
    folder: Path,
    name: str,
    facts: Mapping[str, Any],
    num_parameters: int,
    dtype: torch.dtype,
    is_adapter: bool = False,
) -> None:
    """Write the model card, `README.md`."""
    (folder / "README.md").write_text(_card(name, facts, num_parameters, dtype, is_adapter), encoding="utf-8")


def _card(name: str, facts: Mapping[str, Any], num_parameters: int, dtype: torch.dtype, is_adapter: bool) -> str:
    base = facts.get("base_model")
    on_hub = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not os.path.exists(base)
    library = "peft" if is_adapter else "transformers"
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    front += [f"base_model: {json.dumps(base)}"] if on_hub else []
    front += ["tags:", f"- {TAG}"]
    origin = f"`{base}`, fine-tuned" if base else "Trained"
    kind = str(dtype).removeprefix("torch.")
    of = "Adapters of " if is_adapter else ""
    load = 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")'
    if is_adapter:
        load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")'
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {name}",
        f"{origin} on prompt/output pairs. {of}{num_parameters:,} parameters, {kind}.",
        "\n".join(
            [
                "```python",
                *(["from peft import PeftModel"] if is_adapter else []),
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                f"model = {load}",
                'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
                "```",
            ]
        ),
    ]
    for title, note in (
        ("Data", ""),
        ("Settings", ""),
        ("Results", "As last measured before these weights were saved."),
    ):
        if values := facts.get(title.lower()):
            parts += [f"## {title}", *([note] if note else []), _table(values)]
    if template := facts.get("prompt_template"):
        fence = "````" if "```" in template else "```"
        parts += ["## Prompt", f"{fence}text\n{template}\n{fence}"]
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("lightning-sft", "torch", "transformers", "lightning")
    )
    parts.append(f"Made with {versions}.")
    return "\n\n".join(parts) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", r"\|")
