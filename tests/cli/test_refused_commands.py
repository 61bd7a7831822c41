"""What the program says, in one line, about mistakes in its arguments and configurations."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from support.models import save_tiny_model, tiny_model
from support.refusals import assert_says, in_folder, write
from support.untrusted import Payload, trace_of_payload

from lightning_sft import GenerationMonitor, HuggingFaceExport, compare_runs, export_model, inspect_rows
from lightning_sft.cli.app import main
from lightning_sft.cli.best_responses import best_responses
from lightning_sft.cli.export import export

HELP = " Settings are explained by `lightning-sft fit --help`."
USUAL = {
    "model.model": "{tmp}/model",
    "data.train_data": "{tmp}/train.jsonl",
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "trainer.logger": "CSVLogger",
    "trainer.logger.save_dir": "{tmp}",
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The program, as users call it; returns what it said before it ended, or None if it came to its end."""

    def run(words, name="fit"):
        how = {option: in_folder(value, tmp_path) for option, value in (USUAL | words).items() if value is not None}
        monkeypatch.setattr(sys, "argv", ["lightning-sft", name, *(f"--{word}={value}" for word, value in how.items())])
        try:
            main()
        except SystemExit as end:
            said = capsys.readouterr().err if end.code == 2 else end.code
            assert said.startswith("lightning-sft: error: ")
            return said.removeprefix("lightning-sft: error: ").removesuffix("\n")
        return None

    return run


SETTINGS = {
    "log folder that is a file": (
        {"trainer.logger.save_dir": "{tmp}/file"},
        "The logs are to be written to {tmp}/file, but {tmp}/file is a file. Set `trainer.default_root_dir`, or "
        "the logger's `save_dir`, to another folder.",
    ),
    "log folder in a file, no logger": (
        {
            "trainer.logger": "false",
            "trainer.logger.save_dir": None,
            "trainer.default_root_dir": "{tmp}/file/runs",
        },
        "The logs are to be written to {tmp}/file/runs, but {tmp}/file is a file. Set `trainer.default_root_dir`, or "
        "the logger's `save_dir`, to another folder.",
    ),
    "missing configuration": (
        {"config": "{tmp}/none.yaml"},
        "Parser key \"config\": File does not exist: '{tmp}/none.yaml'." + HELP,
    ),
    "wrong type": (
        {"data.batch_size": "many"},
        "Parser key \"data.batch_size\": Expected a <class 'int'>. Got value: many." + HELP,
    ),
    "reward that cannot be imported": (
        {"generation.reward_fn": "no.such.reward"},
        "Parser key \"generation.reward_fn\": ...: No module named 'no'. Got value: no.such.reward." + HELP,
    ),
    "what a callback refuses": (
        {"trainer.callbacks+": "lightning_sft.LastCheckpoint", "trainer.callbacks.every_n_steps": 0},
        "`every_n_steps` is 0, expected at least 1.",
    ),
    "unknown strategy": (
        {"trainer.strategy": "ddpp"},
        "You selected an invalid strategy name: `strategy='ddpp'`...",
    ),
    "the trainer's clipping": (
        {"trainer.gradient_clip_val": 0.5},
        "`trainer.gradient_clip_val` is 0.5, but `SFTModule` clips gradients itself, by their total norm over all "
        "devices. Use its `max_grad_norm`.",
    ),
    "no device": ({"trainer.devices": 0}, "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
    "unknown setting": ({"model.lrr": 1}, "...lrr..." + HELP),
    "no checkpoint": (
        {"ckpt_path": ""},
        "`ckpt_path` is '', but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.",
    ),
    "no checkpoint to begin with": (
        {"init_from": ""},
        "`init_from` is '', but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.",
    ),
    "best checkpoint": (
        {"ckpt_path": "best"},
        "`ckpt_path` is 'best', but only the program that trained the run knows which checkpoint that is. Give its "
        "path, such as runs/quickstart/version_0/checkpoints/best.ckpt.",
    ),
    "missing checkpoint": (
        {"ckpt_path": "{tmp}/none.ckpt"},
        "`ckpt_path` is '{tmp}/none.ckpt', but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.",
    ),
}


@pytest.mark.parametrize(("words", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_cannot_be_used_is_refused_in_one_line(command, tmp_path, words, expected):
    write(tmp_path / "file", b"")
    assert_says(command(words), expected, tmp_path)


def test_an_evaluation_does_not_begin_with_the_weights_of_another_run(command):
    assert command({"init_from": "a.ckpt"}, "validate") == (
        "`init_from` is 'a.ckpt', but only `fit` begins with the weights of another run. To evaluate them, give the "
        "file as `ckpt_path`."
    )


CONFIGURATIONS = {
    "empty": (b"", "a configuration holds `name: value` lines, but this one is empty." + HELP),
    "list": (b"- a\n- b\n", "a configuration holds `name: value` lines, but this one is - a - b." + HELP),
    "no YAML": (b"a: [1\nb", "Problems parsing config: ...line 1, column 4 did not find expected ',' or ']'..." + HELP),
    "Latin-1": ("a: é".encode("latin-1"), "a configuration is not UTF-8 text (...). Save the file as UTF-8."),
    "unknown setting": (b"data:\n  batchsize: 3\n", "Group 'data' does not accept option 'batchsize'." + HELP),
}


@pytest.mark.parametrize(("content", "expected"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_that_cannot_be_read_is_refused_in_one_line(command, tmp_path, content, expected):
    write(tmp_path / "a.yaml", content)
    assert_says(command({"config": "{tmp}/a.yaml"}), expected, tmp_path)


@pytest.mark.parametrize("name", ["fit", "validate", "predict"])
def test_a_checkpoint_that_holds_code_is_not_loaded(command, tmp_path, name):
    save_tiny_model(tmp_path / "model")
    trace = trace_of_payload(tmp_path)
    torch.save({"state_dict": Payload(trace)}, tmp_path / "bad.ckpt")
    said = command({"ckpt_path": "{tmp}/bad.ckpt"}, name)
    assert said.startswith(f"`ckpt_path` is '{tmp_path}/bad.ckpt', which holds `posix.mkdir`")
    assert not trace.exists()


def test_weights_only_is_on_unless_the_user_says_otherwise(command, tmp_path, monkeypatch):
    seen = []

    def run(self, model, ckpt_path, weights_only):
        seen.append(weights_only)
        self.state.status = TrainerStatus.FINISHED

    monkeypatch.setattr(L.Trainer, "_run", run)
    good = {"state_dict": {}, "pytorch-lightning_version": L.__version__, "loops": {}, "optimizer_states": []}
    torch.save(good, tmp_path / "good.ckpt")
    torch.save({"state_dict": Payload(tmp_path / "trace")}, tmp_path / "bad.ckpt")
    assert command({"ckpt_path": "{tmp}/good.ckpt"}) is None
    assert command({"ckpt_path": "{tmp}/good.ckpt", "weights_only": "false"}) is None
    assert command({"ckpt_path": "{tmp}/bad.ckpt", "weights_only": "false"}) is None  # the user's word
    assert command({"ckpt_path": "https://example.org/good.ckpt"}) is None  # Lightning would take code from there
    assert seen == [True, False, False, True]


WRITERS = {
    "predict_path": lambda where: GenerationMonitor(predict_path=where),
    "folder": lambda where: HuggingFaceExport(folder=where),
    "folder of export_model": lambda where: export_model(tiny_model(), where),
    "folder of inspect_rows": lambda where: inspect_rows(L.Trainer(logger=False), None, None, folder=where),
    "output of export": lambda where: export("last.ckpt", where),
    "output of best_responses": lambda where: best_responses("records.jsonl", where),
    "output of compare": lambda where: compare_runs(["one", "two"], where),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_an_address_is_no_place_to_write_to(writer):
    argument = writer.split()[0]
    with pytest.raises(ValueError, match=f"^`{argument}` is 's3://bucket/rows.jsonl', but nothing is written to an"):
        WRITERS[writer]("s3://bucket/rows.jsonl")


def test_an_address_that_was_made_a_path_is_no_place_to_write_to_either(tmp_path):
    with pytest.raises(ValueError, match="`folder` is 's3:/bucket', but nothing is written to an address"):
        HuggingFaceExport(folder=Path("s3://bucket"))
    assert HuggingFaceExport(folder=tmp_path / "a:b").folder == tmp_path / "a:b"
