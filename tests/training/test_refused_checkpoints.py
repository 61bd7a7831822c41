"""Checkpoints that cannot be continued from: not whole, not safe to load, or of another run."""

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fits import make_trainer
from support.models import character_tokenizer, tiny_config, tiny_model
from support.refusals import ROWS, Provoke, Refusal, assert_says, each, fit, write
from support.untrusted import Payload, trace_of_payload
from torch.distributed.checkpoint import save

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.errors import MissingFileError, SettingsError
from lightning_sft.training.checkpoint_files import check_checkpoint
from lightning_sft.training.checkpoint_weights import read_checkpoint

WEIGHTS = {"state_dict": {"a": torch.zeros(2000)}, "pytorch-lightning_version": "2.6.0"}


def checkpoint(content: object, change: Callable[[bytes], bytes] = lambda good: good) -> Provoke:
    """A file with some content, its bytes changed, that a training is to go on from."""

    def provoke(folder: Path) -> None:
        torch.save(content, folder / "bad.ckpt")
        write(folder / "bad.ckpt", change((folder / "bad.ckpt").read_bytes()))
        check_checkpoint(str(folder / "bad.ckpt"), resume=True)

    return provoke


def sharded(folder: Path, **changes: object) -> Path:
    """The folder of a sharded checkpoint, as Lightning has torch write it: with weights and an optimizer's setting."""
    parts = {"state_dict": WEIGHTS["state_dict"], "optimizer_0": {"lr": 0.1}, "meta.pt": {"loops": {}}} | changes
    torch.save(
        {"pytorch-lightning_version": "2.6.0"} | parts.pop("meta.pt"), write(folder / "sharded" / "meta.pt", b"")
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        save(parts, checkpoint_id=folder / "sharded", no_dist=True)
    return folder / "sharded"


def damaged(name: str, change: Callable[[bytes], bytes | None]) -> Provoke:
    """A sharded checkpoint with a file whose bytes are changed, or which is not there."""

    def provoke(folder: Path) -> None:
        path = sharded(folder) / name
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        check_checkpoint(str(folder / "sharded"), resume=True)

    return provoke


def without_a_part(content: bytes) -> bytes:
    metadata = pickle.loads(content)
    metadata.state_dict_metadata["state_dict.a"].chunks.clear()
    return pickle.dumps(metadata)


def elsewhere(content: bytes) -> bytes:
    metadata = pickle.loads(content)
    for part in metadata.storage_data.values():
        part.relative_path = "../sharded/__0_0.distcp"
    return pickle.dumps(metadata)


SHARDED = "`ckpt_path` is '{tmp}/sharded', which cannot be read: "
FILES = {
    "missing": Refusal(
        lambda folder: check_checkpoint(f"{folder}/none.ckpt", resume=True),
        "`ckpt_path` is '{tmp}/none.ckpt', but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.",
        MissingFileError,
    ),
    "empty": Refusal(
        checkpoint(WEIGHTS, lambda good: b""),
        "`ckpt_path` is '{tmp}/bad.ckpt', which is not a complete checkpoint (0 bytes): it is truncated, or another "
        "kind of file. Use another one, such as the best.",
    ),
    "truncated": Refusal(
        checkpoint(WEIGHTS, lambda good: good[:5000]),
        "`ckpt_path` is '{tmp}/bad.ckpt', which is not a complete checkpoint (5000 bytes): it is truncated, or "
        "another kind of file. Use another one, such as the best.",
    ),
    "pickled alone": Refusal(
        checkpoint(WEIGHTS, lambda good: pickle.dumps({})),
        "`ckpt_path` is '{tmp}/bad.ckpt', which is not a complete checkpoint (...",
    ),
    "with a hole": Refusal(
        checkpoint(WEIGHTS, lambda good: bytes(500) + good[500:]),
        "`ckpt_path` is '{tmp}/bad.ckpt', which cannot be read: ... Take another one.",
    ),
    "folder": Refusal(
        lambda folder: check_checkpoint(str(folder), resume=True),
        "`ckpt_path` is '{tmp}', a folder without a checkpoint. Give the file itself, such as checkpoints/last.ckpt.",
    ),
    "sharded and cut short": Refusal(
        lambda folder: check_checkpoint(str(write(folder / ".metadata", b"").parent), resume=True),
        "`ckpt_path` is '{tmp}', which cannot be read: ... Take another one.",
    ),
    "sharded, no list of its parts": Refusal(
        damaged(".metadata", lambda good: b"garbage" * 9),
        SHARDED + "`.metadata` is cut short, or something else. Take another one.",
    ),
    "sharded, a file missing": Refusal(
        damaged("__0_0.distcp", lambda good: None), SHARDED + "its file __0_0.distcp is missing. Take another one."
    ),
    "sharded, a file cut short": Refusal(
        damaged("__0_0.distcp", lambda good: good[:-100]),
        SHARDED + "its file __0_0.distcp is cut short (... bytes of ...). Take another one.",
    ),
    "sharded, a file in another folder": Refusal(
        damaged(".metadata", elsewhere), SHARDED + "its file ../sharded/__0_0.distcp is missing. Take another one."
    ),
    "sharded, a part of a weight missing": Refusal(
        damaged(".metadata", without_a_part), SHARDED + "a part of state_dict.a is missing. Take another one."
    ),
    "sharded, for a model that is not": Refusal(
        lambda folder: fit(tiny_config(), ckpt_path=str(sharded(folder)))(folder),
        "`ckpt_path` is '{tmp}/sharded', the folder of a sharded model, but here each device holds the whole model. "
        "Set `trainer.strategy` to `ModelParallelStrategy` (`--config fsdp`), also for one device; or let "
        "`lightning-sft export` make a `model` of it.",
    ),
    "missing, from Python": Refusal(
        lambda folder: fit(tiny_config(), ckpt_path=f"{folder}/none.ckpt")(folder),
        "`ckpt_path` is '{tmp}/none.ckpt', but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.",
        MissingFileError,
    ),
    "a folder of checkpoints, from Python": Refusal(
        lambda folder: fit(tiny_config(), ckpt_path=str(folder))(folder),
        "`ckpt_path` is '{tmp}', a folder without a checkpoint. Give the file itself, such as checkpoints/last.ckpt.",
    ),
    "cut short, from Python": Refusal(
        lambda folder: fit(tiny_config(), ckpt_path=str(write(folder / "bad.ckpt", b"PK")))(folder),
        "`ckpt_path` is '{tmp}/bad.ckpt', which is not a complete checkpoint (2 bytes): it is truncated, or another "
        "kind of file. Use another one, such as the best.",
    ),
    "sharded, without an optimizer": Refusal(
        lambda folder: check_checkpoint(str(sharded(folder, optimizer_0={})), resume=True),
        "`ckpt_path` is '{tmp}/sharded', which has only weights. To continue training, use one with an optimizer "
        "state.",
    ),
    "weights of a model": Refusal(
        checkpoint(tiny_model().state_dict()),
        "`ckpt_path` is '{tmp}/bad.ckpt', which is not a checkpoint of a run: it has no `state_dict` beside a "
        "Lightning version. To start from weights, set `model` to a folder that `save_pretrained` made.",
    ),
    "without an optimizer": Refusal(
        checkpoint(WEIGHTS),
        "`ckpt_path` is '{tmp}/bad.ckpt', which has only weights. To continue training, use one with an optimizer "
        "state.",
    ),
}


@each(FILES)
def test_what_is_no_whole_checkpoint_is_refused_before_anything_is_loaded(refusal, tmp_path):
    refusal.check(tmp_path)


def test_weights_alone_are_enough_to_evaluate(tmp_path):
    torch.save(WEIGHTS, tmp_path / "weights.ckpt")
    check_checkpoint(str(tmp_path / "weights.ckpt"), resume=False)


@pytest.mark.parametrize("resume", [True, False])
def test_a_checkpoint_that_holds_code_is_not_loaded(tmp_path, resume):
    trace = trace_of_payload(tmp_path)
    torch.save(WEIGHTS | {"state_dict": Payload(trace)}, tmp_path / "bad.ckpt")
    with pytest.raises(SettingsError) as caught:
        check_checkpoint(str(tmp_path / "bad.ckpt"), resume)
    expected = (
        "`ckpt_path` is '{tmp}/bad.ckpt', which holds `posix.mkdir`, not only tensors and plain values. Loading it "
        "could run code, so it is not loaded. If you trust whoever made it, set `weights_only` to false."
    )
    assert_says(str(caught.value), expected, tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("place", ["meta.pt", "optimizer_0", ".metadata"])
def test_a_sharded_checkpoint_that_holds_code_anywhere_is_not_loaded(tmp_path, place):
    trace = trace_of_payload(tmp_path)
    folder = sharded(tmp_path, **{place: {"lr": Payload(trace)}} if place != ".metadata" else {})
    if place == ".metadata":
        metadata = pickle.loads((folder / place).read_bytes())
        metadata.planner_data = Payload(trace)
        (folder / place).write_bytes(pickle.dumps(metadata))
    for refuse in (lambda: check_checkpoint(str(folder), resume=True), lambda: read_checkpoint(folder)):
        with pytest.raises(SettingsError, match=r"which holds `posix\.mkdir`, not only tensors and plain values"):
            refuse()
    assert not trace.exists()


@pytest.mark.parametrize("module", [b"pathlib", b"pathlib._local"])
def test_a_sharded_checkpoint_of_tensors_and_plain_values_is_loaded(tmp_path, module):
    """Whether or not Python 3.13 has written it, which says that paths are in another module."""
    folder = sharded(tmp_path, state_dict={"a": torch.arange(3.0)})
    metadata = pickle.dumps(pickle.loads((folder / ".metadata").read_bytes()), protocol=2)
    paths = re.compile(rb"c(pathlib|pathlib\._local)\n")
    assert paths.search(metadata)
    (folder / ".metadata").write_bytes(paths.sub(b"c" + module + b"\n", metadata))
    check_checkpoint(str(folder), resume=True)
    assert read_checkpoint(folder)["state_dict"]["a"].tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The checkpoint of a run of one step."""
    path = tmp_path_factory.mktemp("run") / "good.ckpt"
    trainer = make_trainer(path.parent, max_steps=1)
    trainer.fit(SFTModule(tiny_config()), SFTDataModule(character_tokenizer(), ROWS))
    trainer.save_checkpoint(path, weights_only=False)
    return str(path)


def test_a_checkpoint_saved_without_training_is_refused_where_a_run_would_continue(tmp_path):
    data, trainer = SFTDataModule(character_tokenizer(), ROWS, val_data=ROWS), make_trainer(tmp_path, max_steps=1)
    trainer.validate(SFTModule(tiny_config()), data, verbose=False)
    trainer.save_checkpoint(tmp_path / "validated.ckpt")
    with pytest.raises(SettingsError, match=r"such as after `trainer.validate`: it has no state of an optimizer\."):
        trainer.fit(SFTModule(tiny_config()), data, ckpt_path=tmp_path / "validated.ckpt")


OTHER_MODEL = "The checkpoint is of another model: `model.model."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": tiny_config(hidden_size=8)},
            OTHER_MODEL + "embed_tokens.weight` is (131, 16) there and (131, 8) here, and 20 more. Set `model` to the "
            "one that it was trained from.",
        ),
        (
            {"model": tiny_config(num_hidden_layers=1)},
            OTHER_MODEL
            + "layers.1.self_attn.q_proj.weight` exists only there, and 8 more. Set `model` to the one that "
            "it was trained from.",
        ),
        (
            {"model": tiny_config(num_hidden_layers=3)},
            OTHER_MODEL + "layers.2.self_attn.q_proj.weight` is missing there, and 8 more. Set `model` to the one "
            "that it was trained from.",
        ),
        (
            {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)},
            "The checkpoint is of a run with the optimizer torch.optim.adamw.AdamW, but `optimizer` is "
            "torch.optim.sgd.SGD here. Set `optimizer` to the one of that run, or begin a new run with its weights "
            "(`--init_from`).",
        ),
        (
            {"of_data": {"batch_size": 3}},
            "The checkpoint was made with `batch_size` = 32, now it is 3: the run cannot continue at the same place in "
            "the data. Use 32, or begin a new run with its weights (`--init_from`).",
        ),
    ],
    ids=["wider model", "fewer layers", "more layers", "other optimizer", "other data"],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(good, tmp_path, options, message):
    with pytest.raises(SettingsError) as caught:
        fit(**({"model": tiny_config()} | options), ckpt_path=good, trainer={"max_steps": 2})(tmp_path)
    assert_says(str(caught.value), message, tmp_path)
