"""Model cards, read as people and the Hugging Face Hub read them."""

import lightning as L
import torch
from huggingface_hub import ModelCard
from support.fits import ROWS, fit, make_data

from lightning_sft.export.model_card import write_card
from lightning_sft.training.run_facts import RunFacts, run_facts

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
            "`Qwen/Qwen2.5-0.5B`, fine-tuned by supervised learning. 1,234,567 parameters, bfloat16.",
            "",
        ],
        ["## Data", "", "| | |", "| --- | --- |", r"| train | a\|b.jsonl |", "| train rows | 12,345 |", "", "## Sett"],
        ["| optimizer steps | 1,000 |", "| betas | (0.9, 0.999) |", "| fused | True |", ""],
        ["## Prompt", "", "````text", "Run ```{prompt}```", "{{ as it is }}", "````", "", "Made with lightning-sft "],
    ):
        assert "\n".join(lines) in found.text
    assert "## Results" not in found.text


def test_a_result_of_an_earlier_step_says_which_also_where_the_run_has_continued(tmp_path):
    """Validated after 2 and 4 steps; the length is known only the first time."""

    class Lengths(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("val/own", 1.0)
            if trainer.global_step == 2:
                pl_module.log("val/length", 2.0)

    def results(max_steps, ckpt_path=None):
        options = {"max_epochs": -1, "max_steps": max_steps, "val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer = fit(tmp_path, None, make_data(val_data=ROWS[:3]), [Lengths()], ckpt_path, **options)[2]
        trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
        lines = card(tmp_path, run_facts(trainer)).text.partition("## Results")[2].splitlines()
        return {line.strip("| ").split(" | ")[0] for line in lines}

    assert {"train/loss", "val/loss (step 2)", "val/own (step 2)", "val/length (step 2)"} <= results(3)
    assert {"train/loss", "val/loss", "val/own", "val/length (step 2)"} <= results(4, tmp_path / "end.ckpt")


def test_what_is_not_known_is_left_out(tmp_path):
    found = card(tmp_path, RunFacts())
    assert "base_model" not in found.data.to_dict()
    assert "Trained by supervised learning." in found.text
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
