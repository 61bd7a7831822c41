"""The command line, its help, its errors and its configurations; two processes against one."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
import yaml
from support.cuda import take_cpu_for_cuda
from support.models import character_tokenizer, tiny_model
from support.processes import Processes

import lightning_sft
from lightning_sft.cli import main as program
from lightning_sft.cli.app import main, run_command
from lightning_sft.cli.parser import packaged_configs
from lightning_sft.errors import SettingsError
from lightning_sft.results.finished_run import read_run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ROWS = [{"prompt": f"q{i}", "output": "abc" * (1 + i % 4), "ground_truth": f"{i}"} for i in range(13)]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A model, its tokenizer and files; the working directory is empty."""
    torch.manual_seed(1)
    tiny_model().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in {"train": ROWS, "val": ROWS[:5], "prompts": [{"prompt": "q1"}, {"prompt": "q2"}]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def arguments(inputs, command="fit", **changes):
    options = {
        "model.model": inputs / "model",
        "data.train_data": inputs / "train.jsonl",
        "data.val_data": inputs / "val.jsonl",
        "data.batch_size": 4,
        "generation.sampling.max_new_tokens": 3,
        "generation.num_prompts": 3,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": False,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": "runs",
        "trainer.logger.name": "x",
        "trainer.log_every_n_steps": 1,
    } | changes
    return [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
def test_generations_come_before_what_a_user_s_callback_does(inputs):
    """An average of weights, for which the module is copied, puts the model's own back when a validation has ended."""
    averaging = {
        "trainer.callbacks": "lightning.pytorch.callbacks.EMAWeightAveraging",
        "trainer.callbacks.use_buffers": False,
    }
    optimizer = {"model.optimizer": "torch.optim.SGD", "model.optimizer.lr": 0.1}
    cli = run_command(arguments(inputs, **averaging, **optimizer, **{"trainer.fast_dev_run": True}))
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert kinds.index("GenerationMonitor") < kinds.index("EMAWeightAveraging")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_accepted_beside_the_quickstart(config, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_command(["fit", "--config", "quickstart", "--config", str(config), "--print_config"])
    assert not exit_info.value.code
    printed = yaml.safe_load(capsys.readouterr().out)

    def check(given, accepted, path):
        for key, value in given.items():
            assert key in accepted, f"{path}{key} is not a setting"
            if isinstance(value, dict) and isinstance(accepted[key], dict):
                check(value, accepted[key], f"{path}{key}.")
            elif not isinstance(value, list | float | str):
                assert accepted[key] == value

    check(yaml.safe_load(config.read_text()), printed, "")


def test_help_explains_every_setting_in_words(capsys):
    with pytest.raises(SystemExit):
        run_command(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--model.loss_normalization {token,sequence}",
        "negative log-likelihood per response token of the optimizer step",
        "--data.max_tokens_per_microbatch",
        "Sequences per optimizer step, over all devices",
        "--generation.sampling.temperature",
        "0: greedy",
        "--last_checkpoint.every_n_steps",
        "--init_from INIT_FROM Checkpoint whose weights a new run begins with.",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("command", "used"),
    [
        ("preview", {"data", "num_rows"}),
        ("estimate", {"trainer", "model", "data", "throughput", "mfu"}),
        ("find_lr", {"trainer", "model", "data", "min_lr", "max_lr", "num_steps"}),
        ("find_batch_size", {"trainer", "model", "data", "memory_gib", "margin"}),
        ("validate", {"trainer", "model", "data", "generation", "progress_bar", "ckpt_path", "weights_only"}),
        ("compare", {"output", "names", "step"}),
        ("best_responses", {"records", "output", "per_prompt", "min_reward"}),
        (
            "inspect",
            {"trainer", "model", "data", "progress_bar", "ckpt_path", "weights_only", "split", "num_rows", "folder"},
        ),
        ("export", {"ckpt_path", "output", "tokenizer", "dtype", "merge_lora", "weights_only"}),
    ],
)
def test_help_shows_only_what_a_command_uses(command, used, capsys):
    with pytest.raises(SystemExit):
        run_command([command, "--help"])
    shown = set(re.findall(r"^  (?:-\w [A-Z]+, )?--(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert shown - {"config", "print_config", "seed_everything"} == used - {"help"}


def test_fit_then_test_validate_and_predict_from_its_checkpoint(inputs, capsys, monkeypatch):
    run_command(
        arguments(
            inputs, **{"trainer.max_epochs": 2, "model.optimizer.lr": 0.01, "data.test_data": inputs / "val.jsonl"}
        )
    )
    run = Path("runs/x/version_0")
    told = capsys.readouterr().out
    for line in (
        f"Generations:     {run}/generations/index.html",
        f"Curves:          {run}/metrics.csv",
        "last.ckpt",
    ):
        assert line in told
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert json.loads((run / "generations" / "step_8.jsonl").read_text().splitlines()[0])["prompt"] == "q0"
    saved = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    validated = run_command(["validate", *saved]).trainer.callback_metrics
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    last_loss = [row["val/loss"] for row in rows if row["val/loss"]][-1]
    assert validated["val/loss"].item() == pytest.approx(float(last_loss), abs=1e-6)
    tested = run_command(["test", *saved]).trainer.callback_metrics
    assert tested["test/loss"].item() == pytest.approx(float(last_loss), abs=1e-6)
    for version, name in (("version_1", "step_8"), ("version_2", "test_step_8")):  # of the weights, not the trainer
        assert (run.with_name(version) / "generations" / f"{name}.jsonl").is_file()
    for _ in range(2):  # the second time nothing is left to do
        cli = run_command(["predict", *saved, "--data.predict_data", str(inputs / "prompts.jsonl")])
        assert not cli.trainer.predict_loop.predictions
        (written,) = Path("predictions").iterdir()
        assert [json.loads(line)["prompt"] for line in written.read_text().splitlines()] == ["q1", "q2"]
    capsys.readouterr()
    run_command(["inspect", *saved, "--split", "val", "--num_rows", "2"])
    assert f"5 rows: loss {float(last_loss):.4f}, " in (told := capsys.readouterr().out)
    assert f"Page: {run}/inspection/val_step_8.html\nRows: {run}/inspection/val_step_8.jsonl\n" in told
    assert len((run / "inspection" / "val_step_8.jsonl").read_text().splitlines()) == 5
    run_command(["compare", str(run / "generations" / "step_0.jsonl"), str(run), "--names", "[base, tuned]"])
    assert "\nReward of tuned above base: " in (told := capsys.readouterr().out)
    assert told.endswith("\nPage: comparison.html\n")
    # Every other command takes the run's configuration as it is.
    for command, *options in (["preview"], ["estimate"], ["find_lr", "--num_steps", "2"]):
        run_command([command, "--config", str(run / "config.yaml"), *options])
    monkeypatch.setenv("HOME", str(Path.cwd()))
    run_command(["export", *saved, "--output", "~/model"])
    assert Path("model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "options", "flag"),
    [
        ("find_lr", ["--num_steps", "20", "--min_lr", "1e-4"], r"--model\.optimizer\.lr \d(\.\d)?e-\d"),
        ("find_batch_size", ["--margin", "0"], "--data.max_tokens_per_microbatch 122"),  # all of the data
    ],
)
def test_settings_are_found_and_nothing_is_saved(inputs, capsys, monkeypatch, command, options, flag):
    take_cpu_for_cuda(monkeypatch)
    run_command([*arguments(inputs, command), *options])
    assert re.fullmatch(flag, next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--")))
    assert not list(Path.cwd().iterdir())


def test_a_data_file_of_one_line_is_not_taken_for_settings(inputs):
    (inputs / "one.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    words = arguments(inputs, **{"data.train_data": inputs / "one.jsonl", "trainer.fast_dev_run": True})
    facts = run_command(words).datamodule.facts()["data"]
    assert (facts["train"], facts["train rows"]) == ("one.jsonl", 1)


def test_a_run_of_no_epochs_takes_no_step(inputs):
    assert run_command(arguments(inputs, **{"trainer.max_epochs": 0})).trainer.global_step == 0


def test_values_that_two_parts_share_are_given_once(inputs):
    cli = run_command(arguments(inputs, **{"data.seed": 7, "trainer.fast_dev_run": True}))
    assert cli.config.model.seed == 7
    assert cli.config.data.tokenizer == str(inputs / "model")
    assert run_command(arguments(inputs, **{"seed_everything": 9, "trainer.fast_dev_run": True})).config.data.seed == 9
    assert run_command(arguments(inputs, "preview", seed_everything=False)).config.data.seed == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.train_data": "none.jsonl"}, "`train_data` is 'none.jsonl', but there is no such file"),
        ({"data.prompt_field": "question", "data.num_proc": 2}, "line 1 of"),  # from a worker process
        ({"data.prompt_field": "question"}, "no value for `question` (`prompt_field`). The row has"),
        ({"data.max_length": 4}, "exceed `max_length` = 4. Raise `max_length`, or set `too_long`"),
        (
            {"data.gradient_accumulation_steps": 2, "data.max_tokens_per_microbatch": 64},
            "both determine the microbatches. Give one of them",
        ),
        ({"model.model": "no/model"}, "`tokenizer` is 'no/model', which cannot be loaded"),
    ],
)
def test_a_user_s_mistake_ends_in_one_line(inputs, monkeypatch, changes, message):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *arguments(inputs, **changes)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert str(exit_info.value.code).startswith("lightning-sft: error: ")
    assert message in str(exit_info.value.code)


def test_a_mistake_of_the_package_keeps_its_traceback(inputs, monkeypatch):
    def fit(trainer, *args, **kwargs):
        return dict(zip(["a", "b"], [1], strict=True))

    monkeypatch.setattr("lightning.Trainer.fit", fit)
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *arguments(inputs)])
    with pytest.raises(ValueError, match=r"^zip\(\) argument 2 is shorter than argument 1$") as caught:
        main()
    assert caught.traceback[-1].name == "fit"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.lrr", "1"], "lrr"),
        (["--trainer.max_step", "3"], "max_step"),  # no abbreviations
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--data.too_long", "cut"], "data.too_long"),
        (["--model.optimizer", "Adamm"], "Adamm"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_an_unknown_key_or_wrong_type_is_named(inputs, capsys, extra, message):
    with pytest.raises(SystemExit) as exit_info:
        run_command(arguments(inputs) + extra)
    assert exit_info.value.code == 2
    assert message in " ".join(capsys.readouterr().err.splitlines()[-2:])


def in_process(*words, cwd):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lightning_sft", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=240
    )


def test_a_program_does_not_end_with_threads_of_gloo(tmp_path, monkeypatch):
    """Seen once: such a thread aborted a program whose run was complete."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr("lightning_sft.cli.app.run_command", lambda words: None)
    main()
    assert not dist.is_initialized()


def test_two_devices_equal_one(inputs):
    """Losses, metrics, generations and weights; steps of 4 rows, the last one of 1, of which one device gets none."""
    changes = {
        "trainer.max_epochs": 2,
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.3,
        "data.gradient_accumulation_steps": 2,
    }
    results = []
    for devices, more in ((1, {}), (2, {"trainer.strategy": "ddp"})):
        words = [*arguments(inputs, **changes, **more), "--trainer.devices", str(devices)]
        words += ["--trainer.logger.name", f"on_{devices}"]
        if devices == 1:
            run_command(words)
        else:
            done = in_process(*words, cwd=Path.cwd())
            assert done.returncode == 0, done.stderr[-3000:]
        run = Path("runs") / f"on_{devices}" / "version_0"
        rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
        records = [json.loads(line) for line in (run / "generations" / "step_8.jsonl").read_text().splitlines()]
        weights = torch.load(run / "checkpoints" / "last.ckpt")["state_dict"]
        results.append((rows, records, weights))
    (one, records_of_one, weights_of_one), (two, records_of_two, weights_of_two) = results
    for name in (
        "train/loss",
        "train/token_entropy",
        "train/grad_norm",
        "val/loss",
        "val/token_accuracy",
        "val/reward",
    ):
        values = [[float(row[name]) for row in rows if row[name]] for rows in (one, two)]
        assert len(values[0]) == (8 if "train" in name else 2 + (name == "val/reward"))
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert [record["response"] for record in records_of_one] == [record["response"] for record in records_of_two]
    for name, weight in weights_of_one.items():
        torch.testing.assert_close(weight, weights_of_two[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("command", ["fit", "preview"])
def test_without_arguments_it_is_the_quickstart(monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", command])
    monkeypatch.setattr("lightning_sft.cli.app.run_command", lambda words: None)
    main()
    assert sys.argv[2:] == ["--config", str(packaged_configs()["quickstart"])]


def test_a_config_that_comes_with_the_package_is_found_by_name_unless_there_is_a_file_of_that_name(inputs, capsys):
    """From any folder; later ones go over earlier ones, and the short option does the same."""

    def printed(*words):
        with pytest.raises(SystemExit) as exit_info:
            run_command(["fit", *words, "--print_config"])
        assert not exit_info.value.code
        return yaml.safe_load(capsys.readouterr().out)

    assert list(packaged_configs()) == [path.stem for path in CONFIGS]
    (inputs / "work" / "gsm8k").mkdir()  # a folder is no configuration
    settings = printed("-c", "gsm8k", "--config=debug")
    assert settings["data"]["train_data"] == "openai/gsm8k:main:train"
    assert settings["trainer"]["max_steps"] == 4
    (inputs / "work" / "debug").write_text("trainer: {max_steps: 7}")
    assert printed("--config", "gsm8k", "--config", "debug")["trainer"]["max_steps"] == 7


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "--version"])
    program.main()
    assert capsys.readouterr().out == f"lightning-sft {lightning_sft.__version__}\n"


def test_an_unknown_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "train", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        program.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "lightning-sft: error: `train` is not a command; see `lightning-sft --help`.\n"


def test_preview_shows_rows_and_needs_neither_weights_nor_devices_nor_a_checkpoint(inputs, capsys):
    for path in (inputs / "model").iterdir():
        if not path.name.startswith("tokenizer"):
            path.unlink()
    config = {"ckpt_path": "last", "weights_only": None}  # as a run's own configuration has them
    (inputs / "config.yaml").write_text(yaml.safe_dump(config))
    changes = {"trainer.accelerator": "gpu", "trainer.devices": 8, "num_rows": 2}
    run_command([*arguments(inputs, "preview", **changes), "--config", str(inputs / "config.yaml")])
    told = " ".join(capsys.readouterr().out.split())
    assert "line 1: 6 tokens, 4 response tokens prompt │q│0│ response │a│b│c│<eos>│ line 2: 9 tokens" in told
    assert "line 3" not in told
    assert "rows 13 5" in told
    assert told.endswith("optimizer steps per epoch 4")
    assert list(Path().iterdir()) == []  # no run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": -1}, "`num_rows` is -1, expected at least 0"),
        ({"data.max_length": 4}, "exceed `max_length` = 4. Raise `max_length`, or set `too_long`"),
        ({"data.too_long": "cut", "data.max_length": 1}, None),
    ],
)
def test_a_preview_s_mistake_ends_in_one_line(inputs, monkeypatch, capsys, changes, message):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *arguments(inputs, "preview", **changes)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    if message:
        assert message in str(exit_info.value.code)
    else:
        assert capsys.readouterr().err.endswith("Settings are explained by `lightning-sft preview --help`.\n")


# -- continuing ----------------------------------------------------------------------------------------------------


def steps_of(run):
    return torch.load(run / "checkpoints" / "last.ckpt")["global_step"]


def test_the_word_last_continues_the_newest_run_in_its_own_folder(inputs, caplog):
    def words(max_steps):
        return arguments(inputs, **{"trainer.logger": "TensorBoardLogger", "trainer.max_steps": max_steps})

    command = [*words(3), "--ckpt_path", "last"]
    run_command(command)  # nothing to continue: from the beginning
    assert "No checkpoint below runs/x yet" in caplog.text
    run_command(words(2))
    runs = inputs / "work" / "runs" / "x"
    assert [steps_of(runs / f"version_{i}") for i in (0, 1)] == [3, 2]
    command[command.index("--trainer.max_steps") + 1] = "5"
    run_command(command)
    assert [steps_of(runs / f"version_{i}") for i in (0, 1)] == [3, 5]
    assert not (runs / "version_2").exists()
    saved = (runs / "version_1" / "config.yaml").read_text()
    assert "ckpt_path:" not in saved  # or what is done with this file would be done in that folder, from that place
    assert "version: null" in saved
    check_settings_of_continued(runs / "version_1", [*command, "--data.batch_size", "3"])
    assert run_command(
        ["validate", "--ckpt_path", "last", "--config", f"{runs}/version_1/config.yaml"]
    ).config.ckpt_path
    # An evaluation in the run's own folder.
    options = ["--config", f"{runs}/version_1/config.yaml", "--trainer.logger.init_args.version", "version_1"]
    run_command(["validate", *options, "--ckpt_path", f"{runs}/version_1/checkpoints/last.ckpt"])
    assert (runs / "version_1" / "config.yaml").read_text() == saved
    (runs / "version_1" / "checkpoints" / "last.ckpt").write_bytes(b"PK torn")
    run_command(command)
    assert steps_of(runs / "version_0") == 5  # the newest that is whole


def check_settings_of_continued(run, refused):
    """Those of its newest part, and beside them those of the first, but not those that it cannot continue with."""
    files = ["config.yaml", "config_until_step_2.yaml", "hparams.yaml"]
    texts = [(run / name).read_text() for name in files]
    assert ["max_steps: 5" in text for text in texts] == [True, False, True]
    assert texts[1] == texts[0].replace("max_steps: 5", "max_steps: 2")
    with pytest.raises(SettingsError, match="`batch_size`"):
        run_command(refused)
    assert texts == [(run / name).read_text() for name in files]
    assert len(list(run.glob("config*"))) == 2
    assert read_run(run).settings["trainer"]["max_steps"] == 5


def test_last_without_a_configuration_takes_the_newest_runs_own(inputs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "fit", "--ckpt_path", "last"])
    with pytest.raises(SystemExit, match="there is no complete checkpoint below `runs`"):
        main()
    monkeypatch.setattr(sys, "argv", ["lightning-sft"])
    run_command(arguments(inputs, **{"trainer.max_steps": 2}))
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "fit", "--ckpt_path", "last"])
    monkeypatch.setattr("lightning_sft.cli.app.run_command", lambda words: None)
    main()
    run = Path("runs/x/version_0")
    assert sys.argv[2:] == ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    (run / "config.yaml").unlink()
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "fit", "--ckpt_path", "last"])
    with pytest.raises(SystemExit, match=f"{run}/checkpoints/last.ckpt, has no {run}/config.yaml beside it"):
        main()


@pytest.mark.parametrize("lora", [None, '{"r": 2}'])
def test_a_new_run_begins_with_the_weights_of_another_and_with_nothing_else(inputs, lora):
    """At a rate of 0 it ends with them; its steps are counted from 0, and its configuration does not name them."""
    changes = {"trainer.max_steps": 3, "model.optimizer.lr": 0.1} | ({"model.lora": lora} if lora else {})
    run_command(arguments(inputs, **changes))
    runs = Path("runs/x")
    first = runs / "version_0" / "checkpoints" / "last.ckpt"
    words = arguments(inputs, **(changes | {"trainer.max_steps": 1, "model.optimizer.lr": 0.0, "init_from": first}))
    cli = run_command(words)
    assert cli.trainer.global_step == 1
    saved = yaml.safe_load((runs / "version_1" / "config.yaml").read_text())
    assert not {"init_from", "ckpt_path"} & saved.keys()
    earlier, later = (torch.load(runs / f"version_{i}" / "checkpoints" / "last.ckpt")["state_dict"] for i in (0, 1))
    assert earlier.keys() == later.keys()
    for name, weight in earlier.items():
        assert torch.equal(later[name], weight), name
    run_command(["validate", "--config", str(runs / "version_1" / "config.yaml"), "--ckpt_path", str(first)])


def test_a_run_goes_on_from_a_folder_of_adapters_and_continues(inputs):
    changes = {"trainer.max_steps": 2, "model.optimizer.lr": 0.1, "model.lora": '{"r": 2}', "export.merge_lora": False}
    run_command(arguments(inputs, **changes))
    adapters = Path("runs/x/version_0/huggingface").rename("adapters")
    del changes["model.lora"]
    changes |= {"model.model": adapters}
    cli = run_command(arguments(inputs, **changes))
    assert cli.config.data.tokenizer == str(adapters)
    first, second = (Path(f"runs/x/version_{i}/checkpoints/last.ckpt") for i in (0, 1))
    begun, trained = (torch.load(path)["state_dict"] for path in (first, second))
    assert begun.keys() == trained.keys()
    assert not any(torch.equal(weight, trained[name]) for name, weight in begun.items())
    words = ["--config", "runs/x/version_1/config.yaml", "--ckpt_path", "last"]
    assert run_command(["fit", *words, "--trainer.max_steps", "3"]).trainer.global_step == 3
    run_command(["validate", *words])
    run_command(
        ["fit", *arguments(inputs, **{"model.lora": f'{{"path": "{adapters}"}}'})[1:], "--init_from", str(second)]
    )
    for path in adapters.glob("*token*"):
        path.unlink()
    cli = run_command(arguments(inputs, "preview", **{"model.model": adapters}))
    assert cli.config.data.tokenizer == str(inputs / "model")


def test_a_run_does_not_begin_and_continue_at_once(inputs, monkeypatch):
    words = arguments(inputs, **{"init_from": "a.ckpt", "ckpt_path": "last"})
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *words])
    with pytest.raises(
        SystemExit, match=r"`init_from` is 'a\.ckpt' and `ckpt_path` is 'last': the first begins a new run"
    ):
        main()


def test_evaluating_the_last_checkpoint_needs_one(inputs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", *arguments(inputs, "validate"), "--ckpt_path", "last"])
    with pytest.raises(SystemExit, match="`ckpt_path` is 'last', but there is no complete checkpoint below runs/x"):
        main()


def run_in(folder, words):
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    run_command(words)


def test_a_sharded_run_is_evaluated_consolidated_and_loaded(inputs, monkeypatch):
    """The overlay for FSDP2 as it is, on two processes; its checkpoint is good for one process, as a file too."""
    train = [*arguments(inputs, **{"trainer.max_epochs": 1}), "--config", str(ROOT / "configs" / "fsdp.yaml")]
    train[train.index("--trainer.devices") + 1] = "2"
    words = [*train, "--trainer.devices", "2", "--generation.sampling.stop_strings", "['b']"]
    assert Processes(run_in, inputs, words, world_size=2).wait() == [0, 0]
    run = inputs / "runs" / "x" / "version_0"
    last = run / "checkpoints" / "last.ckpt"
    assert last.is_symlink()
    assert len((run / "generations" / "step_4.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(sys, "argv", ["consolidate_checkpoint", str(last.resolve())])
    runpy.run_module("lightning.fabric.utilities.consolidate_checkpoint", run_name="__main__")
    from lightning_sft import SFTModule

    (file,) = last.parent.glob("*.consolidated")
    loaded = SFTModule.load_from_checkpoint(file)
    run_command(arguments(inputs, **{"trainer.max_epochs": 1, "trainer.logger.name": "one"}))
    weights = torch.load(Path("runs") / "one" / "version_0" / "checkpoints" / "last.ckpt")["state_dict"]
    for name, weight in loaded.model.state_dict().items():
        torch.testing.assert_close(weight, weights[f"model.{name}"], rtol=1e-5, atol=1e-6)
