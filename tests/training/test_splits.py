"""How a step is split over microbatches, layouts and processes changes nothing."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from support.processes import Processes
from support.runs import NUM_STEPS, read_log, train
from torch.distributed.tensor import Replicate, Shard

from lightning_sft.errors import SettingsError

try:
    from bitsandbytes.optim import AdamW8bit
except ImportError:
    AdamW8bit = None

# 43 rows in steps of 8: the last step of an epoch has 3 rows, and of these longest first, one process gets 1 of them.
NORMALIZATIONS = {"token": {}, "sequence": {"loss_normalization": "sequence", "normalize_constant": 7.0}}
TOLERANCES = {"float32": {"rtol": 1e-4, "atol": 2e-6}, "float64": {"rtol": 1e-10, "atol": 1e-13}}
CASES = [("token", "float64"), ("sequence", "float32")]
SPLITS = {
    "8 microbatches": {"gradient_accumulation_steps": 8},
    "by tokens": {"max_tokens_per_microbatch": 70},
    "padded": {"layout": "padded"},
    "padded, by tokens": {"layout": "padded", "max_tokens_per_microbatch": 70},
    "workers": {"num_workers": 1, "gradient_accumulation_steps": 3},
}


@pytest.fixture(scope="module")
def whole_steps(tmp_path_factory):
    """The reference: every step in one piece, on one process."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        (normalization, dtype): train(
            folder / f"{normalization}_{dtype}", module=NORMALIZATIONS[normalization], dtype=dtype
        )
        for normalization, dtype in CASES
    }


def assert_same(result, reference, dtype):
    tolerance = TOLERANCES[dtype]
    assert len(result["losses"]) == NUM_STEPS
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(reference["losses"]), rtol=1e-5, atol=0)
    for kind in ("gradients", "weights"):
        assert result[kind].keys() == reference[kind].keys()
        for name, tensor in result[kind].items():
            torch.testing.assert_close(
                tensor, reference[kind][name], **tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_in_pieces_is_the_step_in_one_piece(tmp_path, whole_steps, split):
    for normalization, dtype in CASES:
        folder = tmp_path / f"{normalization}_{dtype}"
        result = train(folder, data=SPLITS[split], module=NORMALIZATIONS[normalization], dtype=dtype)
        assert_same(result, whole_steps[normalization, dtype], dtype)


class CountReductions(L.Callback):
    """Counts how often DDP averages gradients; a tiny model's are all in one bucket."""

    calls = 0

    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(None, self.average)

    def average(self, state, bucket):
        self.calls += 1
        gradient = bucket.buffer() / torch.distributed.get_world_size()
        work = torch.distributed.all_reduce(gradient, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def on_train_end(self, trainer, pl_module):
        Path(trainer.default_root_dir, f"reductions_{trainer.global_rank}").write_text(str(self.calls))


def train_all(folder, module=None, **options):
    """All cases one after another in one process group; what `train` returns is in each case's folder."""
    for normalization, dtype in CASES:
        callbacks = [CountReductions()] if options["strategy"] == "ddp" else []
        settings = NORMALIZATIONS[normalization] | (module or {})
        train(folder / f"{normalization}_{dtype}", module=settings, dtype=dtype, callbacks=callbacks, **options)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", {"data": {"max_tokens_per_microbatch": 60}}),
        ("fsdp", {"data": {"max_tokens_per_microbatch": 60}, "generate": True}),  # between steps
        ("fsdp", {"data": {"gradient_accumulation_steps": 3}, "module": {"sync_every_microbatch": False}}),
    ],
    ids=["ddp", "fsdp, generating", "fsdp, gradients exchanged once"],
)
def test_two_processes_are_one(tmp_path, whole_steps, strategy, options):
    processes = Processes(train_all, tmp_path, strategy=strategy, **options, world_size=2)
    assert processes.wait(timeout=240) == [0, 0]
    for normalization, dtype in CASES:
        folder = tmp_path / f"{normalization}_{dtype}"
        assert_same(torch.load(folder / "result.pt"), whole_steps[normalization, dtype], dtype)
        logs = [read_log(folder / f"steps_{rank}.jsonl") for rank in (0, 1)]
        assert sorted(len(step["rows"]) for log in logs for step in log[5:6]) == [1, 2]
        if strategy == "ddp":
            assert [(folder / f"reductions_{rank}").read_text() for rank in (0, 1)] == [str(NUM_STEPS)] * 2


def test_a_process_without_a_row_takes_part(tmp_path):
    """Steps of 6 of 43 rows: the last has one row, which only one of the processes gets."""
    data = {"batch_size": 6, "gradient_accumulation_steps": 2}
    one = train(tmp_path / "one", data=data)
    for strategy in ("ddp", "fsdp"):
        assert Processes(train, tmp_path / strategy, data=data, strategy=strategy, world_size=2).wait() == [0, 0]
        assert_same(torch.load(tmp_path / strategy / "result.pt"), one, "float32")
        rows = [read_log(tmp_path / strategy / f"steps_{rank}.jsonl")[7]["rows"] for rank in (0, 1)]
        assert sorted(map(len, rows)) == [0, 1], json.dumps(rows)


SHORT = {"data": {"gradient_accumulation_steps": 3}, "dtype": "float64"}


class TwoWholeCopies(L.Callback):
    """Processes 0 and 1 hold the model between them, and so do 2 and 3: the same shares."""

    def on_train_start(self, trainer, pl_module):
        for weight in pl_module.model.parameters():
            assert (weight.device_mesh.mesh.tolist(), weight.placements) == ([[0, 1], [2, 3]], (Replicate(), Shard(0)))
            shares = [None] * 4
            torch.distributed.all_gather_object(shares, weight.to_local().detach())
            assert torch.equal(torch.cat(shares[:2]), weight.full_tensor())
            assert torch.equal(torch.cat(shares[2:]), weight.full_tensor())


def train_in_parts(folder, **options):
    """In two parts, the second continuing the first, whose devices exchange gradients once in a step."""
    for max_steps, once in ((4, {"sync_every_microbatch": False}), (8, {})):
        how = SHORT | {"strategy": "fsdp", "module": once | options, "callbacks": [TwoWholeCopies()]}
        train(folder, **how, max_steps=max_steps, every_n_steps=2)


def test_replicas_of_a_sharded_model_are_one_process_also_when_they_continue(tmp_path):
    """Four processes: two groups of two, each of which holds the whole model."""
    reference = train(tmp_path / "whole", **SHORT, module={"lr_scheduler": "constant_with_warmup"}, max_steps=8)
    options = {"num_replicas": 2, "lr_scheduler": "constant_with_warmup"}
    processes = Processes(train_in_parts, tmp_path / "parts", **options, world_size=4)
    assert processes.wait(timeout=240) == [0] * 4
    result = torch.load(tmp_path / "parts" / "result.pt")
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-10)
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, **TOLERANCES["float64"])


def refused(folder, *cases):
    for message, options in cases:
        with pytest.raises(SettingsError, match=message):
            train(folder, **options)


def test_what_does_not_fit_the_devices_is_refused(tmp_path):
    indivisible = "`num_replicas` is 2, but 2 devices cannot be divided into so many groups of two or more"
    sizes = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    cases = [
        (indivisible, {"strategy": "fsdp", "module": {"num_replicas": 2}}),
        (
            "`data_parallel_size` 2 and `tensor_parallel_size` 1, but tensor parallelism is not supported",
            {"strategy": sizes},
        ),
    ]
    static = {"strategy": DDPStrategy(static_graph=True), "data": {"gradient_accumulation_steps": 2}}
    cases.append(("`static_graph`, .* `model.sync_every_microbatch` to true", static))
    for optimizer in (torch.optim.Adafactor, *([AdamW8bit] if AdamW8bit else [])):
        message = f"`optimizer` is .*{optimizer.__name__}, which cannot train sharded weights: "
        cases.append((message, {"strategy": "fsdp", "module": {"optimizer": optimizer}}))
    assert Processes(refused, tmp_path, *cases, world_size=2).wait() == [0, 0]
    refused(tmp_path, ("`num_replicas` is 2, but the model is not sharded", {"module": {"num_replicas": 2}}))


STORED_IN = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


def train_in_half_precision(folder):
    for precision in STORED_IN:
        train(folder / precision, strategy="fsdp", precision=precision)


def test_a_sharded_model_in_half_precision_stays_close(tmp_path):
    """Blocks are gathered in bfloat16; unless all is, weights, sums of gradients and the optimizer stay in float32."""
    reference = train(tmp_path / "whole")
    assert Processes(train_in_half_precision, tmp_path, world_size=2).wait() == [0, 0]
    for precision, dtype in STORED_IN.items():
        result = torch.load(tmp_path / precision / "result.pt")
        assert result["losses"] == pytest.approx(reference["losses"], rel=0.02)
        assert result["losses"] != pytest.approx(reference["losses"], rel=1e-6)
        for kind in ("gradients", "weights"):
            assert {tensor.dtype for tensor in result[kind].values()} == {dtype}


def test_deterministic_runs_are_equal_to_the_last_bit(tmp_path):
    runs = [train(tmp_path / name, config={"attention_dropout": 0.3}, deterministic=True) for name in "ab"]
    torch.use_deterministic_algorithms(False)  # Lightning leaves it on
    for one, other in zip(*(run["weights"].values() for run in runs), strict=True):
        assert torch.equal(one, other)
