"""Each recipe does a few steps as it is, but for a tiny model, a few rows and one CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.models import character_tokenizer, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft.cli.app import run_command

CONFIGS = Path(__file__).parents[2] / "configs"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
QUESTIONS = [{"question": f"{n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(9)]
CHATS = [
    {
        "prompt": "hi",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you" * (1 + n % 3)}],
    }
    for n in range(9)
]


@pytest.mark.parametrize(
    "names",
    [["gsm8k"], ["chat"], ["gsm8k", "lora"], ["chat", "lora", "qlora"], ["stories"], ["stories", "stories_lora"]],
    ids="-".join,
)
def test_a_recipe_trains_a_tiny_stand_in(names, tmp_path, monkeypatch):
    if "qlora" in names:
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(sys, "argv", ["lightning-sft"])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    config = tiny_config(hidden_size=64, num_attention_heads=4, max_position_embeddings=512, eos_token_id=128)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = CHATS if "chat" in names else QUESTIONS
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {
        "model.model": tmp_path / "model",
        "generation.num_prompts": 2,
        "generation.sampling.max_new_tokens": 3,
        "trainer.max_epochs": "null",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_model_summary": False,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": "runs",
        "data.batch_size": 4,
    }
    if names[0] == "stories":
        words |= {"data.train_data.num_rows": 20, "data.val_data.num_rows": 5}
    else:
        words |= {"data.train_data": tmp_path / "rows.jsonl", "data.val_data": tmp_path / "rows.jsonl"}
    given = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    cli = run_command(["fit", *given, *(word for name, value in words.items() for word in (f"--{name}", str(value)))])
    assert cli.trainer.global_step == 2
    trained = {name for name, weight in cli.model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained) == any(
        "lora" in name for name in names
    )
    assert (Path(cli.trainer.log_dir) / "huggingface" / "model.safetensors").is_file()
