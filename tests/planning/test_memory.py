"""Memory and time found out before a run: against real tensors, to the byte where it is exact."""

import json
import sys

import lightning as L
import pytest
import torch
from support.models import character_tokenizer, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.cli.app import build, main
from lightning_sft.data.collation import collate_packed
from lightning_sft.data.example import Example
from lightning_sft.data.plan import BatchPlan, MicrobatchShape, StepRule
from lightning_sft.model.flops import training_flops
from lightning_sft.model.log_probs import score_responses
from lightning_sft.model.precision import Precision
from lightning_sft.model.pretrained import build_empty_model
from lightning_sft.planning.estimate import estimate_run
from lightning_sft.planning.live_bytes import LiveBytes
from lightning_sft.planning.step_memory import Devices, step_memory
from lightning_sft.training.state_memory import state_memory

OPTIMIZERS = {
    "AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW": torch.optim.AdamW,
    "AMSGrad": lambda params: torch.optim.Adam(params, amsgrad=True),
    "SGD": torch.optim.SGD,
    "SGD with momentum": lambda params: torch.optim.SGD(params, momentum=0.9),
}
LENGTHS, RESPONSES = [40, 30, 20], [10, 20, 5]


def meta_model(**changes):
    return build_empty_model(tiny_config(**changes), {})


def adamw(params):
    return torch.optim.AdamW(params, fused=True)


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_step(name, dtype):
    model = tiny_model().to(dtype)
    model.model.embed_tokens.requires_grad_(False)
    optimizer = OPTIMIZERS[name](weight for weight in model.parameters() if weight.requires_grad)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    memory = state_memory(model.parameters(), OPTIMIZERS[name])
    assert memory.weights == nbytes(model.parameters())
    assert memory.gradients == nbytes(weight.grad for weight in model.parameters() if weight.grad is not None)
    assert memory.gradients < memory.weights
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert memory.optimizer == nbytes(states)


def test_an_optimizer_that_reads_values_is_said_to_be_unknown():
    memory = state_memory(meta_model().parameters(), torch.optim.Adafactor)
    assert memory.optimizer is None
    assert str(memory).startswith("weights and gradients: ")


def kept_by_a_real_forward(model):
    """Bytes of the distinct storages that autograd keeps, but for weights."""
    examples = [
        Example(input_ids=[1] * (n + 1), num_prompt_tokens=n + 1 - r) for n, r in zip(LENGTHS, RESPONSES, strict=True)
    ]
    batch = collate_packed(examples)
    inputs = batch.model_inputs() | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tensors = (batch.input_ids, batch.labels, batch.response_positions)
        score_responses(model, *tensors, normalize_constant=1.0, **inputs)
    for tensor in [*model.parameters(), *model.buffers(), *inputs.values(), batch.input_ids]:
        if torch.is_tensor(tensor):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_what_autograd_keeps_of_a_real_forward_pass():
    from lightning_sft.model.attention import enable_packing

    model = tiny_model(hidden_size=64, intermediate_size=128).train()
    assert enable_packing(model) is None
    expected = kept_by_a_real_forward(model)
    memory = step_memory(
        meta_model(hidden_size=64, intermediate_size=128), adamw, MicrobatchShape(LENGTHS, RESPONSES, 1)
    )
    assert expected <= memory.activations < 1.1 * expected


@pytest.mark.parametrize(("layout", "checkpointing"), [("packed", False), ("packed", True), ("padded", False)])
def test_the_peak_is_that_of_real_optimizer_steps(layout, checkpointing):
    """The same count, over real tensors in a real trainer."""
    rows = [{"prompt": "p" * (40 - 3 * i), "output": "o" * (9 + i)} for i in range(6)]
    counted = LiveBytes()

    class Count(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                states = pl_module.optimizers(use_pl_optimizer=False).state.values()
                counted.keep(pl_module.model.parameters())
                counted.keep(value for state in states for value in state.values())
                pl_module.zero_grad()
                counted.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                counted.__exit__(None, None, None)

    data = SFTDataModule(character_tokenizer(), rows, batch_size=6, layout=layout)
    config = tiny_config(hidden_size=64, intermediate_size=128)
    module = SFTModule(config, optimizer=adamw, lr_scheduler="constant", gradient_checkpointing=checkpointing)
    options = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "precision": "32-true"}
    expected = estimate_run(module, data, options).memory[checkpointing]
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    L.Trainer(**options, **dict.fromkeys(quiet, False), callbacks=[Count()]).fit(module, data)
    assert expected.peak == pytest.approx(counted.peak, rel=0.002)
    assert expected.peak > expected.state.total + 0.5 * expected.activations


def test_a_model_that_reads_values_is_refused_in_one_line():
    model = meta_model()
    model.model.norm.register_forward_hook(lambda module, inputs, output: output * output.sum().item())
    with pytest.raises(ValueError, match="memory of LlamaForCausalLM under 32-true cannot be found out without"):
        step_memory(model, adamw, MicrobatchShape([5], [2], 1))


def test_checkpointing_keeps_less_and_mixed_precision_adds_casts_of_the_weights():
    model = meta_model(hidden_size=64, intermediate_size=128, num_hidden_layers=5)
    plain, again = (
        step_memory(model, adamw, MicrobatchShape([60] * 4, [20] * 4, 1), gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert again.activations < plain.activations / 3
    assert again.peak < plain.peak
    assert again.state == plain.state
    body = sum(weight.numel() for name, weight in model.named_parameters() if "proj" in name)
    two_tokens = MicrobatchShape([2], [1], 1)
    few = {
        word: step_memory(model, adamw, two_tokens, precision=Precision.of(word)) for word in ("32-true", "bf16-mixed")
    }
    assert few["bf16-mixed"].state == few["32-true"].state
    assert few["bf16-mixed"].activations - few["32-true"].activations == pytest.approx(2 * body, rel=0.1)
    half = step_memory(model, adamw, two_tokens, precision=Precision.of("bf16-true")).state
    assert half.weights == few["32-true"].state.weights / 2


def test_shards_divide_the_state_and_copies_add_buckets():
    model = meta_model()
    one, copied, shared = (
        step_memory(model, adamw, MicrobatchShape([30], [10], 1), devices=devices)
        for devices in (Devices(), Devices(num_copies=4), Devices(num_shards=4))
    )
    assert copied.peak == one.peak + one.state.gradients
    assert shared.state.total == pytest.approx(one.state.total / 4, rel=0.01)
    # Embeddings, head and last norm with gradients; two blocks; a block's gradients, twice.
    block = 4 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    assert shared.gathered == 2 * 4 * (2 * 131 * 16 + 16) + 4 * block


# -- the command ---------------------------------------------------------------------------------------------------


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
    build([*words, *gpus.split(), "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy"])
    told = " ".join(capsys.readouterr().out.split())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config()))
    inputs = [i + 5 for i in range(1, 14)]  # prompt, output and EOS, less the last
    pairs = sum(n * (n + 1) // 2 for n in inputs)
    flops = training_flops(model, 2 * sum(inputs), 2 * 6 * 13, 2 * pairs)
    for text in (
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters, all of them trained",
        "gathered weights",
        "optimizer steps 8 ",
        f"tokens {2 * sum(inputs):,}, {2 * 6 * 13} of them of responses",
        f"useful arithmetic {flops:.3g} FLOPs",
        f"time {flops / (1e6 * 8 * 0.4):.0f} s, if 40% of 1e+06 FLOP/s on each device",
        "For 8 CUDA devices, bf16-mixed.",
    ):
        assert text in told


def test_without_the_data_the_settings_bound_a_microbatch(words, capsys, monkeypatch):
    words[words.index("train.jsonl")] = "none.jsonl"
    build([*words, "--data.max_length", "30", "--data.max_tokens_per_microbatch", "60"])
    told = " ".join(capsys.readouterr().out.split())
    assert "The data is not looked at: `train_data` is 'none.jsonl', but there is no such file" in told
    assert "largest microbatch 58 tokens, 58 of responses, 2 sequences, packed" in told
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *words])
    with pytest.raises(SystemExit, match=r"Without data nothing bounds a microbatch. Set `max_tokens_per_microbatch`"):
        main()
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *words, "--mfu", "40"])
    with pytest.raises(SystemExit, match=r"`mfu` is 40.0, expected a share"):
        main()


def test_the_largest_microbatch_is_found_over_ranks_and_steps():
    plan = BatchPlan([5, 9, 3, 3, 7, 1], [1, 2, 3, 4, 5, 6], StepRule(3, max_tokens_per_microbatch=12), shuffle=False)
    assert plan.largest_microbatch(2, "packed") == MicrobatchShape([7, 3, 1], [5, 4, 6], 1)
    assert plan.largest_microbatch(2, "padded") == MicrobatchShape([5, 3], [1, 3], 2)


def test_a_run_begins_by_saying_how_much_it_trains(tmp_path, caplog):
    data = SFTDataModule(character_tokenizer(), [{"prompt": "a", "output": "b"}])
    module = SFTModule(tiny_config(), lr_scheduler="constant")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    L.Trainer(accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **dict.fromkeys(quiet, False)).fit(
        module, data
    )
    count = 2 * 131 * 16 + 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16)
    said = f"{count:,} parameters, all of them trained; weights, gradients and optimizer: {16 * count / 1024:.1f} KiB"
    assert said in caplog.text
