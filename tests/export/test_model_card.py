"""Model cards, read as people and the Hugging Face Hub read them."""

import torch
from huggingface_hub import ModelCard

from lightning_sft.export.model_card import write_card
from lightning_sft.training.run_facts import RunFacts

FACTS = RunFacts(
    base_model="Qwen/Qwen2.5-0.5B",
    data={"train": "a|b.jsonl", "train rows": 12345, "val": None},
    settings={"optimizer steps": 1000, "betas": (0.9, 0.999), "fused": True},
    prompt_template="Run ```{prompt}```\n{{ as it is }}",
)


def card(folder, facts=FACTS, **options):
    write_card(folder, "a: name", facts, 1234567, torch.bfloat16, **options)
    return ModelCard.load(folder / "README.md")


def test_a_card_says_what_is_known_of_the_run(tmp_path):
    found = card(tmp_path)
    assert found.data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightning-sft"],
    }
    for lines in (
        [
            "# a: name",
            "",
            "`Qwen/Qwen2.5-0.5B`, fine-tuned on prompt/output pairs. 1,234,567 parameters, bfloat16.",
            "",
        ],
        ["## Data", "", "| | |", "| --- | --- |", r"| train | a\|b.jsonl |", "| train rows | 12,345 |", "", "## Sett"],
        ["| optimizer steps | 1,000 |", "| betas | (0.9, 0.999) |", "| fused | True |", ""],
        ["## Prompt", "", "````text", "Run ```{prompt}```", "{{ as it is }}", "````", "", "Made with lightning-sft "],
    ):
        assert "\n".join(lines) in found.text
    assert "## Results" not in found.text


def test_what_is_not_known_is_left_out(tmp_path):
    found = card(tmp_path, RunFacts())
    assert "base_model" not in found.data.to_dict()
    assert "Trained on prompt/output pairs." in found.text
    assert "##" not in found.text
    local = card(tmp_path, RunFacts(base_model=str(tmp_path)))
    assert "base_model" not in local.data.to_dict()  # nobody else has it
    assert f"`{tmp_path}`, fine-tuned" in local.text


def test_adapters_are_loaded_on_top_of_their_model(tmp_path):
    found = card(tmp_path, is_adapter=True)
    assert found.data.library_name == "peft"
    assert "Adapters of 1,234,567 parameters" in found.text
    assert "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n" in found.text
    load = 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"), "path/to/this/folder")'
    assert f"\n\nmodel = {load}\n" in found.text
