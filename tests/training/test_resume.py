"""A run that is killed, stopped or moved, and goes on, is the run that nobody disturbed."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.processes import Processes
from support.runs import ROWS, read_log, train

from lightning_sft.errors import SettingsError

# 43 rows in steps of 8 are 6 steps an epoch: validations, checkpoints and generations fall everywhere in it.
NUM_STEPS = 16
SETTINGS = {
    "max_steps": NUM_STEPS,
    "data": {"val_data": ROWS[:5], "num_workers": 1},
    "config": {"attention_dropout": 0.2},
    "val_check_interval": 7,
    "every_n_steps": 2,
    "generate": True,
}


def assert_same_steps(folder: Path, straight: Path, num_steps: int, world_size: int = 1) -> None:
    """Every line that any part of the run logged is that of the straight run, and nothing is missing."""
    for kind in ("steps", "validations", "epoch_starts", "epoch_ends"):
        for rank in range(world_size):
            expected = {line["step"]: line for line in read_log(straight / f"{kind}_{rank}.jsonl")}
            found = read_log(folder / f"{kind}_{rank}.jsonl")
            assert [(line, expected[line["step"]]) for line in found if line != expected[line["step"]]] == []
            assert {line["step"] for line in found} == expected.keys()
    assert {line["step"] for line in read_log(folder / "steps_0.jsonl")} == set(range(1, num_steps + 1))


def assert_same_run(folder: Path, straight: Path, num_steps: int) -> None:
    """The same steps, generations and last checkpoint, to the last bit."""
    assert_same_steps(folder, straight, num_steps)
    for file in (straight / "generations").glob("*.jsonl"):
        assert (folder / "generations" / file.name).read_bytes() == file.read_bytes()
    ours, theirs = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (folder, straight))
    assert ours["global_step"] == theirs["global_step"] == num_steps
    assert ours["SFTDataModule"] == theirs["SFTDataModule"]
    for name in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def wait_for_step(folder: Path, step: int, processes: Processes, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not (log := read_log(folder / "steps_0.jsonl")) or log[-1]["step"] < step:
        assert time.monotonic() < deadline
        assert processes.all_run()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    train(folder, **SETTINGS)
    return folder


# Before the first checkpoint, at an epoch's end, within an epoch, where a validation follows; and more of the kind.
@pytest.mark.parametrize(
    "step", [1, 6, 9, 14, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 7, 11, 12))]
)
def test_killed_after_any_step_a_run_goes_on_as_if_nothing_had_happened(tmp_path, straight, step):
    processes = Processes(train, tmp_path, callbacks=[KillAfter(step)], **SETTINGS)
    assert processes.wait() == [-signal.SIGKILL]
    assert Processes(train, tmp_path, **SETTINGS).wait() == [0]
    assert_same_run(tmp_path, straight, NUM_STEPS)


def test_killed_while_it_validates_a_run_validates_again(tmp_path, straight):
    assert Processes(train, tmp_path, callbacks=[KillInValidation()], **SETTINGS).wait() == [-signal.SIGKILL]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 12  # 14 is saved after its validation
    assert Processes(train, tmp_path, **SETTINGS).wait() == [0]
    assert_same_run(tmp_path, straight, NUM_STEPS)


class KillInValidation(L.Callback):
    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == 14:
            os.killpg(0, signal.SIGKILL)


class KillAfter(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.killpg(0, signal.SIGKILL)  # its workers too


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_that_are_killed_go_on_as_if_nothing_had_happened(tmp_path, strategy):
    settings = SETTINGS | {"strategy": strategy, "generate": False, "limit_train_batches": 2}
    if strategy == "ddp":  # of streamed rows, of which each process tokenises its share
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        streamed = {"train_data": str(tmp_path / "rows.jsonl"), "streaming": True, "shuffle_buffer": 10}
        settings |= {"data": SETTINGS["data"] | streamed}
    assert Processes(train, tmp_path / "straight", world_size=2, **settings).wait() == [0, 0]
    folder = tmp_path / "killed"
    for step in (4, 11):
        processes = Processes(train, folder, world_size=2, **settings)
        wait_for_step(folder, step, processes)
        processes.kill()
    assert Processes(train, folder, world_size=2, **settings).wait() == [0, 0]
    assert_same_steps(folder, tmp_path / "straight", NUM_STEPS, world_size=2)
    ours, theirs = (torch.load(run / "result.pt") for run in (folder, tmp_path / "straight"))
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=0)
    if strategy == "fsdp":
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {f"step_{NUM_STEPS}", "last.ckpt"}  # the folder, and the link to it


@pytest.mark.parametrize("num_kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_storm_of_kills_leaves_no_trace(tmp_path, num_kills):
    """Kills at random moments. Checkpoints are being written most of the time; every other step ends an epoch."""
    num_steps = 5 * num_kills
    settings = SETTINGS | {"max_steps": num_steps, "every_n_steps": 1, "limit_train_batches": 2}
    epoch_files = {f"epoch={epoch}.ckpt" for epoch in range(1, num_steps // 2 + 1)}

    def each_epoch(folder):
        options = {"every_n_epochs": 1, "save_top_k": -1, "save_on_train_epoch_end": True, "save_weights_only": True}
        return [ModelCheckpoint(folder / "epochs", "{epoch}", **options)]

    train(tmp_path / "straight", callbacks=each_epoch(tmp_path / "straight"), **settings)
    folder, moments = tmp_path / "storm", random.Random(0)
    for _ in range(num_kills):
        processes = Processes(train, folder, callbacks=each_epoch(folder), **settings)
        done = max((line["step"] for line in read_log(folder / "steps_0.jsonl")), default=0)
        wait_for_step(folder, done + 1, processes)
        time.sleep(moments.uniform(0, 0.04))
        assert processes.kill() == [-signal.SIGKILL]
    assert Processes(train, folder, callbacks=each_epoch(folder), **settings).wait() == [0]
    assert_same_run(folder, tmp_path / "straight", num_steps)
    assert {path.name for path in (tmp_path / "straight" / "epochs").iterdir()} == epoch_files
    assert {path.name for path in (folder / "epochs").iterdir()} >= epoch_files  # one more where a kill came after it
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


def kill_while_writing(moment, folder, **settings):
    """Train, and be killed in the middle of the third checkpoint: half written, whole but not in place, or in place."""
    num_saved, save, replace = 0, torch.save, os.replace

    def torn_save(checkpoint, file):
        nonlocal num_saved
        save(checkpoint, file)
        num_saved += 1
        if num_saved == 3 and moment == "half written":
            file.truncate(file.tell() // 2)
            os.killpg(0, signal.SIGKILL)

    def torn_replace(*paths):
        if num_saved == 3 and moment == "not in place":
            os.killpg(0, signal.SIGKILL)
        replace(*paths)
        if num_saved == 3:
            os.killpg(0, signal.SIGKILL)

    torch.save, os.replace = torn_save, torn_replace
    train(folder, **settings)


@pytest.mark.parametrize(("moment", "step"), [("half written", 4), ("not in place", 4), ("in place", 6)])
def test_a_torn_checkpoint_is_never_taken_for_a_good_one(tmp_path, straight, moment, step):
    settings = SETTINGS | {"generate": False}
    assert Processes(kill_while_writing, moment, tmp_path, **settings).wait() == [-signal.SIGKILL]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == ({"last.ckpt"} if moment == "in place" else {"last.ckpt", ".last.ckpt.partial"})
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == step
    assert Processes(train, tmp_path, **SETTINGS).wait() == [0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert_same_steps(tmp_path, straight, NUM_STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_came_in_and_nothing_is_done_twice(tmp_path, straight, number):
    settings = SETTINGS | {"every_n_steps": None}
    for step in (2, 9):
        processes = Processes(train, tmp_path, callbacks=[Slow()], **settings)
        wait_for_step(tmp_path, step, processes)
        os.kill(processes.pids[0], number)
        assert processes.wait() == [128 + number]
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt")["global_step"]
        assert saved == read_log(tmp_path / "steps_0.jsonl")[-1]["step"]
    assert Processes(train, tmp_path, **settings).wait() == [0]
    assert_same_run(tmp_path, straight, NUM_STEPS)
    assert [line["step"] for line in read_log(tmp_path / "steps_0.jsonl")] == list(range(1, NUM_STEPS + 1))


class Slow(L.Callback):
    """Makes steps long enough for a signal to come in the middle of one."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        time.sleep(0.05)


def test_a_second_interrupt_stops_at_once(tmp_path):
    processes = Processes(train, tmp_path, callbacks=[Slow()], max_steps=1000)
    wait_for_step(tmp_path, 1, processes)
    for _ in range(2):
        os.kill(processes.pids[0], signal.SIGINT)
        time.sleep(0.02)
    assert processes.wait() == [1]  # Lightning's own
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path, strategy):
    settings = SETTINGS | {"generate": False, "strategy": strategy, "every_n_steps": None}
    processes = Processes(train, tmp_path, callbacks=[Slow()], world_size=2, **settings)
    wait_for_step(tmp_path, 2, processes)
    os.kill(processes.pids[1], signal.SIGTERM)
    assert processes.wait() == [128 + signal.SIGTERM] * 2
    first, second = (read_log(tmp_path / f"steps_{rank}.jsonl") for rank in (0, 1))
    assert len(first) == len(second) < NUM_STEPS
    assert Processes(train, tmp_path, world_size=2, **settings).wait() == [0, 0]
    assert [line["step"] for line in read_log(tmp_path / "steps_0.jsonl")] == list(range(1, NUM_STEPS + 1))


def train_on_own_disk(folder, **settings):
    disk = folder / f"disk_{os.environ['RANK']}"
    try:
        train(disk, **settings)
    except SettingsError as error:
        (disk / "refused").write_text(str(error))


@pytest.mark.parametrize(
    ("steps", "start"), [(0, "step 2, but process 1 from no checkpoint"), (1, "step 2, .* step 1")]
)
def test_machines_that_do_not_find_the_same_checkpoint_are_refused(tmp_path, steps, start):
    """They used to wait for one another."""
    for rank, max_steps in enumerate((2, steps)):
        if max_steps:
            train(tmp_path / f"disk_{rank}", **SETTINGS | {"max_steps": max_steps})
    settings = SETTINGS | {"strategy": "ddp", "world_size": 2}
    assert Processes(train_on_own_disk, tmp_path, **settings).wait() == [0, 0]
    for rank in (0, 1):
        assert re.search(f"{start}.*in a folder that they share", (tmp_path / f"disk_{rank}" / "refused").read_text())


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """As a process that `srun` has started, whose `scontrol` writes its words into a file."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    variables = {"JOB_NAME": "train", "JOB_ID": "12", "STEP_ID": "0", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in (variables | {"NODEID": "0", "NODELIST": "localhost"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path


class Requeue(L.Callback):
    """Sends SLURM's signal in the middle of the third step."""

    def __init__(self):
        self.inside = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inside = True
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.inside = False


def test_slurms_signal_to_requeue_is_handed_on_between_two_steps(slurm, monkeypatch):
    """Lightning's handler would save in the middle of a step, and twice if it were left in charge."""
    seen, requeue = [], Requeue()
    handler = "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector._slurm_sigusr_handler_fn"
    monkeypatch.setattr(handler, lambda connector, *_: seen.append((connector.trainer.global_step, requeue.inside)))
    train(slurm, callbacks=[requeue], max_steps=5)
    assert seen == [(3, False)]
    assert len(read_log(slurm / "steps_0.jsonl")) == 5


@pytest.mark.parametrize(("array", "name"), [({}, "12"), ({"JOB_ID": "10", "TASK_ID": "2"}, "10_2")])
def test_a_job_is_requeued_once_its_run_is_saved(slurm, monkeypatch, array, name):
    for variable, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{variable}", value)
    with pytest.raises(SystemExit) as end:
        train(slurm, callbacks=[Requeue()], requeue=True, max_steps=5)
    assert end.value.code == 128 + signal.SIGUSR1
    assert (slurm / "asked").read_text() == f"requeue {name}\n"
    assert torch.load(slurm / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert not list(slurm.rglob("hpc_ckpt*"))
    assert (slurm / "slurm_job.txt").read_text() == "12.0\n"


def test_a_run_goes_on_where_slurm_does_not_requeue_its_job(slurm):
    (slurm / "bin" / "scontrol").write_text("#!/bin/sh\necho Job is not allowed >&2; exit 1\n")
    with pytest.warns(UserWarning, match="does not restart job 12: Job is not allowed"):
        train(slurm, callbacks=[Requeue()], requeue=True, max_steps=5)
    assert len(read_log(slurm / "steps_0.jsonl")) == 5


def test_a_run_may_move_to_another_number_of_processes(tmp_path):
    """The order of the data does not depend on it, so the losses go on as they would have.

    The optimizer's state is that of the same parameters, though its order is another than the model's.
    """
    groups = [{"pattern": "norm", "weight_decay": 0.0}]
    options = {"every_n_steps": 7, "module": {"freeze": ["layers.0.mlp"], "parameter_groups": groups}}
    straight = train(tmp_path / "straight", **options)
    moves = [
        (("auto", 1), ("fsdp", 2)),
        (("ddp", 2), ("auto", 1)),
        (("fsdp", 2), ("fsdp", 1)),
        (("fsdp, one file", 2), ("auto", 1)),
    ]
    for first, second in moves:
        folder = tmp_path / f"{first[0]}_{second[1]}"
        stopped = Processes(train, folder, strategy=first[0], world_size=first[1], callbacks=[KillAfter(8)], **options)
        assert stopped.wait() == [-signal.SIGKILL] * first[1]
        assert Processes(train, folder, strategy=second[0], world_size=second[1], **options).wait() == [0] * second[1]
        found = {line["step"]: line["train/loss"] for line in read_log(folder / "steps_0.jsonl")}
        assert [found[step] for step in range(1, len(straight["losses"]) + 1)] == pytest.approx(
            straight["losses"], rel=1e-5
        )


def test_weights_in_float64_go_on_to_the_last_bit(tmp_path):
    options = {"module": {"lr_scheduler": "constant", "warmup_steps": 0}, "precision": "64-true"}
    straight = train(tmp_path / "straight", max_steps=4, **options)["weights"]
    for max_steps in (2, 4):
        continued = train(tmp_path / "continued", max_steps=max_steps, **options)["weights"]
    torch.testing.assert_close(continued, straight, rtol=0, atol=0)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    train(tmp_path, max_steps=3)
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"last\.ckpt cannot be written: No space left on device \(.* GiB free\)\. The one before is still there"
    with pytest.raises(OSError, match=message):
        train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before
