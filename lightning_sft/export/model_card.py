"""Model cards: what a run was trained on, how, and how well it did, in a file that goes with the weights."""

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from lightning_sft.training.run_facts import RunFacts

TAG = "lightning-sft"
_TEMPLATE = Path(__file__).with_name("model_card.md")
_PACKAGES = ("lightning-sft", "torch", "transformers", "lightning")


def write_card(
    folder: Path, name: str, facts: RunFacts, num_parameters: int, dtype: torch.dtype, is_adapter: bool = False
) -> None:
    """Write the model card, `README.md`.

    `num_parameters` and `dtype` are of what the folder holds: the model, or adapters without it (`is_adapter`).
    """
    base, prompt_template = facts.base_model, facts.prompt_template
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if base is not None and _is_on_hub(base) else None,
        tags=[TAG],
    )
    card = ModelCard.from_template(
        data,
        str(_TEMPLATE),
        name=name,
        base=base,
        is_adapter=is_adapter,
        num_parameters=f"{num_parameters:,}",
        dtype=str(dtype).removeprefix("torch."),
        tables=[
            ("Data", None, _rows(facts.data)),
            ("Settings", None, _rows(facts.settings)),
            ("Results", "As last measured before these weights were saved.", _rows(_dated_results(facts))),
        ],
        prompt_template=prompt_template,
        fence="````" if prompt_template and "```" in prompt_template else "```",
        versions=", ".join(f"{package} {version(package)}" for package in _PACKAGES),
    )
    card.save(folder / "README.md")


def _is_on_hub(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not os.path.exists(model)


def _dated_results(facts: RunFacts) -> dict[str, float]:
    """The results by name, with the step of those that were measured before the last one."""
    steps = {name: step for name, step in facts.measured_at.items() if step != facts.settings.get("optimizer steps")}
    return {f"{name} (step {steps[name]:,})" if name in steps else name: value for name, value in facts.results.items()}


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_cell(name), _cell(value)) for name, value in values.items() if value is not None]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", r"\|")
