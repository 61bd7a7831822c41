"""Memory and time found out before a run, against the run."""

import json
import sys

import lightning as L
import pytest
import torch
from support.models import character_tokenizer, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.cli.app import main, run_command
from lightning_sft.model.flops import training_flops
from lightning_sft.planning.estimate import estimate_run
from lightning_sft.planning.live_bytes import LiveBytes

SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"


def adamw(params):
    return torch.optim.AdamW(params, fused=True)


ROWS = [{"prompt": "p" * (40 - 3 * i), "output": "o" * (9 + i)} for i in range(6)]


def estimated_and_real(module, precision="32-true", **data):
    """Memory of an optimizer step, and the peak of a real one: the same count, over real tensors in a real trainer."""
    counted = LiveBytes()

    class Count(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 1:
                states = pl_module.optimizers(use_pl_optimizer=False).state.values()
                counted.keep(pl_module.model.parameters())
                counted.keep(value for state in states for value in state.values())
                pl_module.zero_grad()
                counted.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                counted.__exit__(None, None, None)

    rows = SFTDataModule(character_tokenizer(), ROWS, batch_size=6, **data)
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "precision": precision}
    estimate = estimate_run(module, rows, options)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    L.Trainer(**options, **dict.fromkeys(quiet, False), callbacks=[Count()]).fit(module, rows)
    return estimate.memory[module.checkpointing.gradient_checkpointing], counted.peak


@pytest.mark.parametrize(("layout", "checkpointing"), [("packed", False), ("packed", True), ("padded", False)])
def test_the_peak_is_that_of_real_optimizer_steps(layout, checkpointing):
    config = tiny_config(hidden_size=64, intermediate_size=128)
    module = SFTModule(config, optimizer=adamw, lr_scheduler="constant", gradient_checkpointing=checkpointing)
    expected, peak = estimated_and_real(module, layout=layout)
    assert expected.peak == pytest.approx(peak, rel=0.002)
    assert expected.peak > expected.state.total + 0.5 * expected.activations


def test_the_peak_beside_4_bit_weights_is_that_of_real_optimizer_steps(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.for_model(**tiny_config(hidden_size=128, intermediate_size=512))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    kwargs = {"quantization_config": settings}
    module = SFTModule(str(tmp_path), optimizer=adamw, lora={"r": 4}, model_kwargs=kwargs, lr_scheduler="constant")
    expected, peak = estimated_and_real(module, "bf16-mixed")
    assert expected.peak == pytest.approx(peak, rel=0.01)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | kwargs))  # as if it were stored in 4 bits
    module = SFTModule(str(tmp_path), optimizer=adamw, lora={"r": 4})
    data, trainer = SFTDataModule(character_tokenizer(), ROWS, batch_size=6), {"precision": "bf16-mixed"}
    assert estimate_run(module, data, trainer).memory[False].state == expected.state
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | kwargs | {"dtype": "float32"}))
    in_half = estimate_run(module, data, {"precision": "bf16-true"}).memory[False].state  # adapters too
    assert in_half.weights == expected.state.weights - expected.state.gradients // 2
    with pytest.raises(ValueError, match="such weights can not be sharded; use the strategy `ddp`"):  # as `fit` says
        estimate_run(module, data, {"strategy": SHARDED, "devices": 2})


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A configuration without weights: a folder with nothing but config.json, tokenizer and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-sft"])
    AutoConfig.for_model(**tiny_config()).save_pretrained("model")
    character_tokenizer().save_pretrained("model")
    rows = [{"prompt": "p" * i, "output": "o" * 5} for i in range(1, 14)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "estimate",
        "--model.model",
        "model",
        "--data.train_data",
        "train.jsonl",
        "--data.batch_size",
        "4",
        "--trainer.max_epochs",
        "2",
    ]


def test_the_command_needs_no_weights_and_no_devices(words, capsys):
    gpus = "--trainer.accelerator gpu --trainer.devices 8 --trainer.precision bf16-mixed --throughput.peak_flops 1e6"
    run_command([*words, *gpus.split(), "--trainer.strategy", SHARDED])
    told = " ".join(capsys.readouterr().out.split())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config()))
    inputs = [i + 5 for i in range(1, 14)]  # prompt, output and EOS, less the last
    pairs = sum(n * (n + 1) // 2 for n in inputs)
    flops = training_flops(model, 2 * sum(inputs), 2 * 6 * 13, 2 * pairs)
    for text in (
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters, all of them trained",
        "gathered weights",
        "optimizer steps 8 ",
        f"tokens {2 * sum(inputs):,}, {2 * 6 * 13} of them in responses",
        f"model FLOPs {flops:.3g}",
        f"time {flops / (1e6 * 8 * 0.4):.0f} s, if each device reaches 40% of 1e+06 FLOP/s",
        "For 8 CUDA devices, bf16-mixed.",
    ):
        assert text in told


def test_without_the_data_the_settings_bound_a_microbatch(words, capsys, monkeypatch):
    words[words.index("train.jsonl")] = "none.jsonl"
    quantized = ["--model.model_kwargs", '{"quantization_config": {"quant_method": "hqq"}}']
    run_command([*words, "--data.max_length", "30", "--data.max_tokens_per_microbatch", "60", *quantized])
    told = " ".join(capsys.readouterr().out.split())
    assert "The data is not read: `train_data` is 'none.jsonl', but there is no such file" in told
    assert "largest microbatch 58 tokens, 58 in responses, 2 sequences, packed" in told
    assert "`quantization_config` is not considered, all weights are counted in full: " in told
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *words])
    with pytest.raises(
        SystemExit, match=r"The data is not read: .*no such file: Without rows a microbatch has no size limit. Set"
    ):
        main()
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *words, "--mfu", "40"])
    with pytest.raises(SystemExit, match=r"`mfu` is 40.0, expected a fraction"):
        main()


@pytest.mark.parametrize(("strategy", "problem"), [("ddp", "not sharded"), (SHARDED, "4 devices cannot be divided")])
def test_replicas_that_a_run_would_refuse_are_refused(words, monkeypatch, strategy, problem):
    more = f"--trainer.devices 4 --trainer.strategy {strategy} --model.num_replicas 3"
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *words, *more.split()])
    with pytest.raises(SystemExit, match=f"`num_replicas` is 3, but .*{problem}"):
        main()
