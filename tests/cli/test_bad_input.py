"""Bad input, in bulk: what users get wrong, and the one line that each of them is told.

In a message, `{tmp}` is the folder of the test, `{stock}` the one with a good model and checkpoint, and `...` what
other libraries say, which changes with their version. Then fuzzing: whatever rows hold, either there is such a line or
the mask marks the output's tokens and no other. Last: loading runs no code.
"""

import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus
from support.models import character_tokenizer, tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_sft import (
    GenerationMonitor,
    Sampling,
    SFTDataModule,
    SFTModule,
    log_generations,
    tokenize_prompt_and_output,
)
from lightning_sft.cli.app import SFTCLI, main
from lightning_sft.errors import SettingsError

ROWS = [{"prompt": f"q{i}", "output": "abc"} for i in range(4)]
GOOD = b'{"prompt": "a", "output": "b"}\n'
SETTINGS = " Settings are explained by `lightning-sft fit --help`."


class Folders(dict):
    """`tmp` and `stock`."""

    def write(self, name: str, content: str | bytes) -> Path:
        path = self["tmp"] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def fill(self, value: object) -> object:
        return value.format(**self) if isinstance(value, str) and re.search("{tmp}|{stock}", value) else value


class RefusedError(Exception):
    """What the command line printed before it ended."""


class RecordedError(Exception):
    """What a record says about a reward that failed."""


Provoke = Callable[[Folders], object]


# -- how to provoke ----------------------------------------------------------------------------------------------------


def data(**options: object) -> Provoke:
    """A data module, set up."""

    def provoke(folders):
        how = {"tokenizer": character_tokenizer(), "train_data": ROWS} | options
        SFTDataModule(**{name: folders.fill(value) for name, value in how.items()}).setup("fit")

    return provoke


def file(name: str, content: str | bytes, **options: object) -> Provoke:
    """A data module over one file."""

    def provoke(folders):
        data(train_data=str(folders.write(name, content)), **options)(folders)

    return provoke


def row(row: dict, **options: object) -> Provoke:
    """A data module over a good row and this one."""
    return data(train_data=[{"prompt": "a", "output": "b"}, row], **options)


def template(content: bytes) -> Provoke:
    """A prompt template in a file."""

    def provoke(folders):
        data(prompt_template=str(folders.write("template.txt", content)))(folders)

    return provoke


def module(model: object, **options: object) -> Provoke:
    """A module, its model loaded."""
    return lambda folders: SFTModule(folders.fill(model), **options).configure_model()


def model_folder(*gone: str, **files: str | bytes | dict) -> Provoke:
    """A module over a copy of the good model with other files; a dictionary changes a JSON file."""

    def provoke(folders):
        folder = folders["tmp"] / "model"
        shutil.copytree(folders["stock"] / "model", folder)
        for name in gone:
            (folder / name).unlink()
        for name, content in files.items():
            path = folder / name.replace("__", ".")
            if isinstance(content, dict):
                content = json.dumps(json.loads(path.read_text()) | content)
            folders.write(str(path), content)
        SFTModule(str(folder)).configure_model()

    return provoke


def fit(model: dict, trainer: dict | None = None, tokenizer: object = None, **options: object) -> Provoke:
    """One optimizer step."""

    def provoke(folders):
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        how = {"accelerator": "cpu", "max_steps": 1, "enable_checkpointing": False} | silent | (trainer or {})
        rows = SFTDataModule(tokenizer or character_tokenizer(), ROWS)
        L.Trainer(default_root_dir=folders["tmp"], **how).fit(SFTModule(model, **options), rows)

    return provoke


def command(words: dict[str, object], name: str = "fit", prepare: Provoke | None = None) -> Provoke:
    """The program, as users call it."""
    usual = {
        "model.model": "{stock}/model",
        "data.train_data": "{stock}/train.jsonl",
        "data.val_data": "{stock}/train.jsonl",
        "generation.sampling.max_new_tokens": 1,
        "generation.num_prompts": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": "{tmp}",
    }

    def provoke(folders):
        if prepare is not None:
            prepare(folders)
        how = {option: folders.fill(value) for option, value in (usual | words).items() if value is not None}
        with pytest.MonkeyPatch.context() as patch:
            only = {name: LightningCLI.subcommands()[name]}  # a parser for each would take seconds
            patch.setattr(SFTCLI, "subcommands", staticmethod(lambda: only))
            patch.setattr(sys, "argv", ["lightning-sft", name, *(f"--{word}={value}" for word, value in how.items())])
            try:
                main()
            except SystemExit as end:
                raise RefusedError(end.code) from None

    return provoke


def checkpoint(make: Callable[[Folders, bytes], object], name: str = "fit", **words: object) -> Provoke:
    """The program, continuing from what is made of the good checkpoint's bytes."""

    def prepare(folders):
        made = make(folders, (folders["stock"] / "good.ckpt").read_bytes())
        if isinstance(made, bytes):
            folders.write("bad.ckpt", made)
        elif made is not None:
            torch.save(made, folders["tmp"] / "bad.ckpt")

    return command({"ckpt_path": "{tmp}/bad.ckpt"} | words, name, prepare)


def other_model(**changes: object) -> Provoke:
    """The program, continuing from the good checkpoint with a model of another form."""

    def prepare(folders):
        tiny_model(**changes).save_pretrained(folders["tmp"] / "other")
        character_tokenizer().save_pretrained(folders["tmp"] / "other")

    return command({"ckpt_path": "{stock}/good.ckpt", "model.model": "{tmp}/other"}, prepare=prepare)


def generate(prompts: object = ("a",), ground_truths: object = ("b",), **options: object) -> Provoke:
    """Two tokens for each prompt."""

    def provoke(folders):
        how = {"reward_fn": lambda *_: dict.fromkeys(("format_reward", "answer_reward", "reward"), 0.0)} | options
        how = {name: folders.fill(value) for name, value in how.items()}
        return log_generations(
            tiny_model(), character_tokenizer(), prompts, ground_truths, sampling=Sampling(max_new_tokens=2), **how
        )

    return provoke


def reward(function: Callable[[str, str], object], **options: object) -> Provoke:
    """A generation whose reward fails; its record says why, and counts as 0."""

    def provoke(folders):
        (record,), summary = generate(reward_fn=function, **options)(folders)
        assert (record.format_reward, record.answer_reward, record.reward) == (0.0, 0.0, 0.0)
        assert summary["reward_failures"] == 1
        raise RecordedError(record.reward_error)

    return provoke


def without_eos() -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> dict:
    row = {"prompt": "a", "output": "b"}
    row["itself"] = row
    return row


def talkative(row: dict) -> dict:
    raise LookupError("no such\n  column")


def parquet(folders: Folders) -> bytes:
    Dataset.from_list(ROWS).to_parquet(folders["tmp"] / "good.parquet")
    return (folders["tmp"] / "good.parquet").read_bytes()


def hangs(response: str, ground_truth: str) -> dict[str, float]:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def leaves(response: str, ground_truth: str) -> dict[str, float]:
    sys.exit(3)


def rewards_of(**changes: float) -> Callable[[str, str], dict[str, float]]:
    def length_reward(response, ground_truth):
        return {"format_reward": 1.0, "answer_reward": 1.0, "reward": 1.0} | changes

    return length_reward


# -- the table ---------------------------------------------------------------------------------------------------------

UNREADABLE = "`train_data`: cannot read {tmp}/"
NEITHER = "neither a file (.jsonl, .json, .csv, .parquet) nor a data set that can be loaded: "
KINDS = "expected a file, a data set's name, a list of these, a `datasets.Dataset`, or a list of dictionaries."
LLAMA = "{'model_type': 'llama', ..., which cannot be built: "
OTHER_REWARD = "Return a dict with the keys format_reward, answer_reward, reward, each a finite number."

BAD: dict[str, tuple[Provoke, type[Exception], str]] = {
    # files
    "empty file": (file("a.jsonl", b""), ValueError, UNREADABLE + "a.jsonl: it has no rows."),
    "missing file": (
        data(train_data="{tmp}/a.jsonl"),
        FileNotFoundError,
        "`train_data` is '{tmp}/a.jsonl', but there is no such file.",
    ),
    "no name": (data(train_data=" "), ValueError, "`train_data` is ' '; expected a file or the name of a data set."),
    "file with a split": (
        data(train_data="{tmp}/a.jsonl::train"),
        ValueError,
        "`train_data` is '{tmp}/a.jsonl::train', but a file has neither configuration nor split. Use '{tmp}/a.jsonl'.",
    ),
    "file of another kind": (
        file("a.pkl", pickle.dumps(ROWS)),
        ValueError,
        "`train_data` is '{tmp}/a.pkl'; expected a file ending in .jsonl, .json, .csv, .parquet.",
    ),
    "compressed file": (
        file("a.jsonl.gz", b"\x1f\x8b"),
        ValueError,
        "`train_data` is '{tmp}/a.jsonl.gz'; expected a file ending in .jsonl, .json, .csv, .parquet.",
    ),
    "truncated JSONL": (
        file("a.jsonl", GOOD + GOOD[:17]),
        ValueError,
        UNREADABLE
        + 'a.jsonl: line 2: not valid JSON (Unterminated string starting at column 17): \'{"prompt": "a", "\'',
    ),
    "truncated JSON": (
        file("a.json", b"[" + GOOD + b","),
        ValueError,
        UNREADABLE + "a.json: Expecting value: line 2 column 2 (char 33)",
    ),
    "JSON that nests deep": (
        file("a.jsonl", GOOD + b"[" * 100_000),
        ValueError,
        UNREADABLE + "a.jsonl: line 2: cannot be read as JSON: maximum recursion depth exceeded...",
    ),
    "JSON with a number of 5,000 digits": (
        file("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}"),
        ValueError,
        UNREADABLE + "a.jsonl: line 1: cannot be read as JSON: Exceeds the limit (4300 digits)...",
    ),
    "CSV with a row too long": (
        file("a.csv", "prompt,output\na,b,c\n"),
        ValueError,
        UNREADABLE + "a.csv: row 1: expected 2 fields, as in the header, got 3.",
    ),
    "CSV with an open quote": (
        file("a.csv", 'prompt,output\na,"b\n'),
        ValueError,
        UNREADABLE + "a.csv: line 2: unexpected end of data.",
    ),
    "CSV with a column twice": (
        file("a.csv", "prompt,output,output\na,b,c\n"),
        ValueError,
        UNREADABLE + "a.csv: its header has 'output' more than once. Rename all but one.",
    ),
    "CSV with carriage returns alone": (
        file("a.csv", "prompt,output\ra,b\r"),
        ValueError,
        UNREADABLE + "a.csv: line 1: a carriage return in a field without quotes. Quote the field, or end lines with a "
        "line feed.",
    ),
    "truncated Parquet": (
        lambda folders: file("a.parquet", parquet(folders)[:-20])(folders),
        ValueError,
        UNREADABLE + "a.parquet: Parquet magic bytes not found in footer...",
    ),
    "damaged Parquet": (
        lambda folders: file("a.parquet", parquet(folders)[:20] + bytes(40) + parquet(folders)[60:])(folders),
        ValueError,
        UNREADABLE + "a.parquet: ...",
    ),
    "folder of nothing": (data(train_data="{tmp}"), ValueError, "`train_data` is '{tmp}': " + NEITHER + "..."),
    "folder with a damaged file": (
        lambda folders: data(train_data=str(folders.write("set/a.jsonl", '{"a": {').parent))(folders),
        ValueError,
        "`train_data` is '{tmp}/set': " + NEITHER + "DatasetGenerationError: ...",
    ),
    "folder without the split": (
        lambda folders: data(train_data=f"{folders.write('set/a.jsonl', GOOD).parent}::dev")(folders),
        ValueError,
        "`train_data` is '{tmp}/set::dev': "
        + NEITHER
        + "ValueError: Unknown split \"dev\". Should be one of ['train'].",
    ),
    "no hub": (data(train_data="no/set"), ValueError, "`train_data` is 'no/set': " + NEITHER + "ConnectionError: ..."),
    # encodings
    "Latin-1 JSONL": (
        file("a.jsonl", GOOD + '{"prompt": "é"}'.encode("latin-1")),
        ValueError,
        UNREADABLE + "a.jsonl: line 2: not UTF-8 text (invalid continuation byte). Save the file as UTF-8.",
    ),
    "UTF-16 CSV": (
        file("a.csv", "prompt,output\na,b\n".encode("utf-16")),
        ValueError,
        UNREADABLE + "a.csv: line 1: not UTF-8 text (invalid start byte). Save the file as UTF-8.",
    ),
    "lone surrogate": (
        file("a.jsonl", rb'{"prompt": "a", "output": "\ud800"}'),
        ValueError,
        "line 1 of {tmp}/a.jsonl: `output` (`output_field`) holds a lone surrogate, which is not text: '\\ud800'.",
    ),
    # rows and fields
    "line without object": (
        file("a.jsonl", GOOD + b"[1, 2]"),
        ValueError,
        UNREADABLE + "a.jsonl: line 2: expected a JSON object, got [1, 2].",
    ),
    "value alone in a JSON file": (
        file("a.json", '"abc"'),
        ValueError,
        UNREADABLE + "a.json: line 1: expected a JSON object, got 'abc'.",
    ),
    "row without output": (
        row({"prompt": "a"}),
        ValueError,
        "row 2 of `train_data`: no value for `output` (`output_field`). The row has ['prompt'].",
    ),
    "row with a thousand other columns": (
        row({f"column_{number}": 1 for number in range(1000)}),
        ValueError,
        "row 2 of `train_data`: no value for `prompt` (`prompt_field`). The row has ['column_0', ...",
    ),
    "prompt of null": (
        row({"prompt": None, "output": "b"}),
        ValueError,
        "row 2 of `train_data`: no value for `prompt` (`prompt_field`). The row has ['output', 'prompt'].",
    ),
    "output of NaN": (
        file("a.jsonl", '{"prompt": "a", "output": NaN}'),
        ValueError,
        "line 1 of {tmp}/a.jsonl: `output` (`output_field`) is nan of type float, expected a string.",
    ),
    "output of bytes": (
        row({"prompt": "a", "output": b"b"}),
        ValueError,
        "row 2 of `train_data`: `output` (`output_field`) is {'bytes': \"b'b'\"} of type dict, expected a string.",
    ),
    "prompt of several texts": (
        row({"prompt": ["a", "b"], "output": "b"}),
        ValueError,
        "row 2 of `train_data`: `prompt` (`prompt_field`) is ['a', 'b'] of type list, expected a string.",
    ),
    "conversation without a chat template": (
        row({"prompt": [{"role": "user", "content": "a"}], "output": "b"}),
        ValueError,
        "row 2 of `train_data`: the row has messages, but the tokenizer has no chat template. Pass `chat_template`, a "
        "text or a file, or name the columns of a prompt and an output.",
    ),
    "ground truth of a number": (
        row({"prompt": "a", "output": "b", "ground_truth": 4}),
        ValueError,
        "row 2 of `train_data`: `ground_truth` (`ground_truth_field`) is 4 of type int, expected a string.",
    ),
    "row in a circle": (
        data(train_data=[cyclic()]),
        ValueError,
        "`train_data`: row 1: cannot be written as JSON: Circular reference detected.",
    ),
    "row with a tuple for a column": (
        row({("a", 1): "b"}),
        ValueError,
        "`train_data`: row 2: cannot be written as JSON: keys must be str, int, float, bool or None, not tuple.",
    ),
    "row that nests deep": (
        row({"prompt": "a", "output": "b", "more": nested(100_000)}),
        ValueError,
        "`train_data`: row 2: cannot be written as JSON: maximum recursion depth exceeded...",
    ),
    "rows without output or EOS": (
        row({"prompt": "a", "output": ""}, append_eos=False),
        ValueError,
        "row 2 of `train_data`: no response token to learn from; `output` is ''. Remove the row, or set "
        "`append_eos=True`.",
    ),
    "unknown prompt_field": (
        data(prompt_field="question"),
        ValueError,
        "row 1 of `train_data`: no value for `question` (`prompt_field`). The row has ['output', 'prompt'].",
    ),
    "prompt_field of a number": (
        data(prompt_field=3),
        TypeError,
        "`prompt_field` is 3 of type int, expected the name of a column.",
    ),
    "ground_truth_field of none": (
        data(ground_truth_field=None),
        TypeError,
        "`ground_truth_field` is None of type NoneType, expected the name of a column.",
    ),
    "transform that fails": (
        data(row_transform=lambda row: row["question"]),
        ValueError,
        "row 1 of `train_data`: `row_transform` failed: KeyError: 'question'",
    ),
    "transform that says a lot": (
        data(row_transform=talkative),
        ValueError,
        "row 1 of `train_data`: `row_transform` failed: LookupError: no such column",
    ),
    "transform that is no function": (
        data(row_transform="f"),
        TypeError,
        "`row_transform` is 'f', expected a function.",
    ),
    # types of data
    "no data": (
        data(train_data=None),
        ValueError,
        "`train_data` is needed for fit; expected a file, a data set or a list of rows.",
    ),
    "no rows": (data(val_data=[]), ValueError, "`val_data` has no rows; expected at least one."),
    "data of a number": (data(train_data=3.5), TypeError, "`train_data` is 3.5 of type float; " + KINDS),
    "data of bytes": (data(train_data=b"x"), TypeError, "`train_data` is b'x' of type bytes; " + KINDS),
    "data of one row": (
        data(train_data={"prompt": "a"}),
        TypeError,
        "`train_data['prompt']` is 'a' of type str, expected a weight: how many times an epoch goes through its rows.",
    ),
    "weight of a truth value": (
        data(train_data={"a.jsonl": True}),
        TypeError,
        "`train_data['a.jsonl']` is True of type bool, expected a weight: how many times an epoch goes through "
        "its rows.",
    ),
    "weight of zero": (
        data(train_data={"a.jsonl": 0}),
        ValueError,
        "`train_data['a.jsonl']` is 0, expected a positive number: how many times an epoch goes through its rows. "
        "Leave the source out if it is not to be used.",
    ),
    "weight without end": (
        data(train_data={"a.jsonl": float("inf")}),
        ValueError,
        "`train_data['a.jsonl']` is inf, expected a positive number: how many times an epoch goes through its rows. "
        "Leave the source out if it is not to be used.",
    ),
    "weight without a source": (
        data(train_data={3: 1}),
        TypeError,
        "`train_data` is 3 of type int, expected a file or a data set's name before each weight.",
    ),
    "weights of nothing": (
        data(train_data={}),
        ValueError,
        "`train_data` is {}; expected at least one source with its weight.",
    ),
    "weights of validation rows": (
        data(val_data={"a.jsonl": 2}),
        TypeError,
        "`val_data` is {'a.jsonl': 2}, but weights are for `train_data` alone. Give a list of the sources.",
    ),
    # templates
    "template without column": (
        data(prompt_template="Question:"),
        FileNotFoundError,
        "`prompt_template` is 'Question:', which has no {column} in it and is no file either. Give a text such as "
        "'Question: {question}', or the path of a file with such a text.",
    ),
    "template with an open brace": (
        data(prompt_template="{prompt"),
        ValueError,
        "`prompt_template` has unbalanced braces (expected '}' before end of string). Write literal braces twice.",
    ),
    "template with code": (
        data(prompt_template="{prompt.__class__}"),
        ValueError,
        "`prompt_template` has {prompt.__class__}, but expects plain column names such as {question}. Write literal "
        "braces twice.",
    ),
    "template with an example in JSON": (
        data(prompt_template='{prompt} Answer as {\n "answer": 1}'),
        ValueError,
        '`prompt_template` has {\\n "answer": 1}, but expects plain column names such as {question}. Write literal '
        "braces twice.",
    ),
    "template with an unknown column": (
        data(prompt_template="{question}"),
        ValueError,
        "row 1 of `train_data`: no value for `question` (`prompt_template`). The row has ['output', 'prompt'].",
    ),
    "template of a number": (
        data(prompt_template=5),
        TypeError,
        "`prompt_template` is 5 of type int, expected a text or the path of a file, as a string.",
    ),
    "template file without column": (
        template(b"Question:"),
        ValueError,
        "`prompt_template` has no {column} in it, so all prompts would be the same.",
    ),
    "template file in Latin-1": (
        template("é {prompt}".encode("latin-1")),
        ValueError,
        "`prompt_template` is '{tmp}/template.txt', which is not UTF-8 text (invalid continuation byte). Save the file "
        "as UTF-8.",
    ),
    # tokenizers
    "no tokenizer": (
        data(tokenizer=None),
        ValueError,
        "`tokenizer` is missing; expected a name, a path or a tokenizer.",
    ),
    "tokenizer of a number": (
        data(tokenizer=5),
        TypeError,
        "`tokenizer` is 5 of type int, expected a name, a path or a tokenizer.",
    ),
    "missing tokenizer": (
        data(tokenizer="{tmp}/none"),
        ValueError,
        "`tokenizer` is '{tmp}/none', which cannot be loaded: there is no such folder.",
    ),
    "tokenizer folder of nothing": (
        data(tokenizer="{tmp}"),
        ValueError,
        "`tokenizer` is '{tmp}', which cannot be loaded: ...",
    ),
    "truncated tokenizer": (
        lambda folders: data(tokenizer=str(folders.write("t/tokenizer.json", "{").parent))(folders),
        ValueError,
        "`tokenizer` is '{tmp}/t', which cannot be loaded: ...",
    ),
    "tokenizer without EOS": (
        data(tokenizer=without_eos()),
        ValueError,
        "`append_eos` is True, but the tokenizer has no EOS token. Set `tokenizer.eos_token`, or pass "
        "`append_eos=False` (the model then never learns to stop).",
    ),
    "tokenizer of another model": (
        fit(tiny_config(vocab_size=100)),
        ValueError,
        "The tokenizer has 131 tokens, but the model only 100 embeddings. Use the model's own tokenizer, or call "
        "`model.resize_token_embeddings` first.",
    ),
    "one prompt instead of a list": (
        lambda folders: tokenize_prompt_and_output("ab", ["c", "d"], character_tokenizer()),
        TypeError,
        "Expected a list of prompts, but got one string, 'ab'. Put it into a list.",
    ),
    "output that is no text": (
        lambda folders: tokenize_prompt_and_output(["a", "b"], ["c", None], character_tokenizer()),
        TypeError,
        "output 1 is None of type NoneType, expected a string.",
    ),
    "prompt with a lone surrogate": (
        lambda folders: tokenize_prompt_and_output(["a\udc80"], ["c"], character_tokenizer()),
        ValueError,
        "prompt 0 holds a lone surrogate, which is not text: 'a\\udc80'.",
    ),
    # lengths and numbers
    "row too long": (
        data(max_length=5),
        ValueError,
        "row 1 of `train_data`: 6 tokens (2 of the prompt) exceed `max_length` = 5. Raise `max_length`, or set "
        '`too_long` to "drop" or "truncate".',
    ),
    "all rows too long": (
        data(max_length=5, too_long="drop"),
        ValueError,
        "`train_data`: all 4 rows are longer than `max_length` = 5 tokens. Raise `max_length`.",
    ),
    "row longer than a microbatch": (
        data(max_tokens_per_microbatch=4),
        ValueError,
        "`max_tokens_per_microbatch` is 4, but example 0 has 5 tokens. Raise `max_tokens_per_microbatch` to at least "
        "that, or lower `max_length`.",
    ),
    "row longer than the model": (
        fit(tiny_config(max_position_embeddings=4)),
        ValueError,
        "A row has 6 tokens, but the model has only 4 positions. Set `max_length` to 4 at most, and `too_long` to drop "
        "or truncate.",
    ),
    "max_length of 1": (
        data(max_length=1),
        ValueError,
        "`max_length` is 1, expected at least 2: a prompt token and a response token.",
    ),
    "max_length of text": (
        data(max_length="512"),
        TypeError,
        "`max_length` is '512' of type str, expected a whole number.",
    ),
    "batch_size of 0": (data(batch_size=0), ValueError, "`batch_size` is 0, expected at least 1."),
    "batch_size of a half": (
        data(batch_size=4.5),
        TypeError,
        "`batch_size` is 4.5 of type float, expected a whole number.",
    ),
    "batch_size of none": (
        data(batch_size=None),
        TypeError,
        "`batch_size` is None of type NoneType, expected a whole number.",
    ),
    "batch_size of true": (
        data(batch_size=True),
        TypeError,
        "`batch_size` is True of type bool, expected a whole number.",
    ),
    "two rules for microbatches": (
        data(gradient_accumulation_steps=2, max_tokens_per_microbatch=64),
        ValueError,
        "`gradient_accumulation_steps` is 2 and `max_tokens_per_microbatch` is 64, but each alone decides the "
        "microbatches. Give one of them.",
    ),
    "val_fraction of 1": (
        data(val_fraction=1.0),
        ValueError,
        "`val_fraction` is 1.0, expected a share of the rows: at least 0, below 1.",
    ),
    "val_fraction of text": (
        data(val_fraction="0.1"),
        TypeError,
        "`val_fraction` is '0.1' of type str, expected a share of the rows.",
    ),
    "val_fraction of one row": (
        data(train_data=ROWS[:1], val_fraction=0.5),
        ValueError,
        "`val_fraction` is 0.5, but `train_data` has one row, which cannot be split.",
    ),
    "two sources of validation": (
        data(val_data=ROWS, val_fraction=0.1),
        ValueError,
        "Both `val_data` and `val_fraction` are given; the validation rows come from one of them.",
    ),
    "unknown too_long": (
        data(too_long="cut"),
        ValueError,
        "`too_long` is 'cut', expected one of error, drop, truncate.",
    ),
    "unknown layout": (data(layout="flat"), ValueError, "`layout` is 'flat', expected one of packed, padded."),
    "append_eos of text": (
        data(append_eos="no"),
        TypeError,
        "`append_eos` is 'no' of type str, expected true or false.",
    ),
    "negative seed": (data(seed=-1), ValueError, "`seed` is -1, expected at least 0."),
    "num_proc of 0": (data(num_proc=0), ValueError, "`num_proc` is 0, expected at least 1."),
    "negative num_workers": (data(num_workers=-1), ValueError, "`num_workers` is -1, expected at least 0."),
    # models
    "model of a number": (
        module(5),
        TypeError,
        "`model` is 5 of type int, expected a name, a path, settings or a model.",
    ),
    "missing model": (
        module("{tmp}/none"),
        ValueError,
        "`model` is '{tmp}/none', which cannot be loaded: there is no such folder.",
    ),
    "settings without a type": (
        module({"hidden_size": 8}),
        ValueError,
        "`model` is to be built from {'hidden_size': 8}, whose `model_type` is no architecture that this version of "
        "`transformers` knows. Give one, such as qwen2 or llama.",
    ),
    "settings that contradict each other": (
        module(tiny_config(hidden_size=15)),
        ValueError,
        "`model` is " + LLAMA + "...The hidden size (15) is not a multiple of the number of attention heads (2).",
    ),
    "settings of text": (
        module(tiny_config(hidden_size="16")),
        ValueError,
        "`model` is " + LLAMA + "...Field 'hidden_size' expected int, got str (value: '16')",
    ),
    "settings of a model that reads both ways": (
        module({"model_type": "t5"}),
        ValueError,
        "`model` is {'model_type': 't5'}, which cannot be built: Unrecognized configuration class ...",
    ),
    "unknown attention": (
        module(tiny_config(), model_kwargs={"attn_implementation": "flush"}),
        ValueError,
        "`model` is " + LLAMA + 'Specified `attn_implementation="flush"` is not supported....',
    ),
    "unknown argument of the model": (
        module(tiny_config(), model_kwargs={"nonsense": 1}),
        ValueError,
        "`model` is " + LLAMA + "TypeError: ... got an unexpected keyword argument 'nonsense'",
    ),
    "folder without config": (
        model_folder("config.json"),
        ValueError,
        "`model` is '{tmp}/model', which cannot be loaded: ...",
    ),
    "folder with a truncated config": (
        model_folder(config__json='{"model_type": "lla'),
        ValueError,
        "`model` is '{tmp}/model', which cannot be loaded: ...config.json' is not a valid JSON file.",
    ),
    "folder without weights": (
        model_folder("model.safetensors"),
        ValueError,
        "`model` is '{tmp}/model', which cannot be loaded: Error no file named model.safetensors...",
    ),
    "folder with empty weights": (
        model_folder(model__safetensors=b""),
        ValueError,
        "`model` is '{tmp}/model', which cannot be loaded: SafetensorError: ...header...",
    ),
    "folder with truncated weights": (
        lambda folders: model_folder(
            model__safetensors=(folders["stock"] / "model" / "model.safetensors").read_bytes()[:-9]
        )(folders),
        ValueError,
        "`model` is '{tmp}/model', which cannot be loaded: SafetensorError: ...",
    ),
    "folder with weights of other shapes": (
        model_folder(config__json={"hidden_size": 8}),
        ValueError,
        "`model` is '{tmp}/model', whose weights have `lm_head.weight` as (131, 16) instead of (131, 8), and 20 more: "
        "they are not those of its config.json. To train such a model all the same, load it yourself and pass it as "
        "`model`.",
    ),
    "folder with a layer too few": (
        model_folder(config__json={"num_hidden_layers": 3}),
        ValueError,
        "`model` is '{tmp}/model', whose weights lack `model.layers.2.input_layernorm.weight`, and 8 more: they are "
        "not those of its config.json. To train such a model all the same, load it yourself and pass it as `model`.",
    ),
    # what training needs
    "unknown loss": (
        module({}, loss_normalization="tokens"),
        ValueError,
        "`loss_normalization` is 'tokens', expected 'token' or 'sequence'.",
    ),
    "max_grad_norm of NaN": (
        module({}, max_grad_norm=math.nan),
        ValueError,
        "`max_grad_norm` is nan, expected a positive number.",
    ),
    "max_grad_norm of text": (
        module({}, max_grad_norm="1"),
        TypeError,
        "`max_grad_norm` is '1' of type str, expected a positive number or none.",
    ),
    "warmup_steps of two and a half": (
        module({}, warmup_steps=2.5),
        ValueError,
        "`warmup_steps` is 2.5, expected a number of steps or a share below 1.",
    ),
    "model_kwargs of a list": (
        module({}, model_kwargs=[1]),
        TypeError,
        "`model_kwargs` is [1] of type list, expected a mapping of arguments.",
    ),
    "optimizer by name in Python": (
        module({}, optimizer="AdamW"),
        TypeError,
        "`optimizer` is 'AdamW', expected a function of the parameters.",
    ),
    "unknown schedule": (
        fit(tiny_config(), lr_scheduler="cosin"),
        ValueError,
        "`lr_scheduler` is 'cosin': cosin is not a valid SchedulerType, please select one of ['linear', ...",
    ),
    "schedule of a metric": (
        fit(tiny_config(), lr_scheduler="reduce_lr_on_plateau"),
        ValueError,
        "`lr_scheduler` is 'reduce_lr_on_plateau', which follows a metric, not the optimizer steps.",
    ),
    "unknown argument of the schedule": (
        fit(tiny_config(), lr_scheduler_kwargs={"cycles": 2}),
        ValueError,
        "`lr_scheduler` is 'cosine' with `lr_scheduler_kwargs` = {'cycles': 2}: ... got an unexpected keyword argument "
        "'cycles'",
    ),
    "schedule over an endless run": (
        fit(tiny_config(), {"max_steps": -1, "max_epochs": -1}),
        ValueError,
        "`lr_scheduler` is 'cosine' with `warmup_steps` = 0.03, but the run has no length. Set `max_steps` or "
        "`max_epochs`, or choose `constant` or `constant_with_warmup` with a number of steps.",
    ),
    # generation and rewards
    "temperature of NaN": (
        lambda folders: Sampling(temperature=math.nan),
        ValueError,
        "`temperature` is nan, expected 0 (greedy) or more.",
    ),
    "stop_strings of one text": (
        lambda folders: Sampling(stop_strings="</answer>"),
        TypeError,
        "`stop_strings` is '</answer>' of type str, expected a list of texts.",
    ),
    "stop_strings of nothing": (
        lambda folders: Sampling(stop_strings=[""]),
        ValueError,
        "`stop_strings` has '', expected texts of at least one character.",
    ),
    "num_prompts of 0": (
        lambda folders: GenerationMonitor(num_prompts=0),
        ValueError,
        "`num_prompts` is 0, expected at least 1.",
    ),
    "every_n_steps of a half": (
        lambda folders: GenerationMonitor(every_n_steps=0.5),
        TypeError,
        "`every_n_steps` is 0.5 of type float, expected a whole number.",
    ),
    "sampling of a dictionary": (
        lambda folders: GenerationMonitor(sampling={"temperature": 1}),
        TypeError,
        "`sampling` is {'temperature': 1} of type dict, expected a `Sampling`.",
    ),
    "no time for rewards": (
        lambda folders: GenerationMonitor(reward_seconds=0),
        ValueError,
        "`reward_seconds` is 0, expected a positive number, or none.",
    ),
    "reward that is no function": (
        lambda folders: GenerationMonitor(reward_fn="exact"),
        TypeError,
        "`reward_fn` is 'exact', expected a function of response and ground truth.",
    ),
    "prompts and ground truths of other numbers": (
        generate(["a", "b"], ["c"]),
        ValueError,
        "There are 2 `prompts`, but 1 `ground_truths`.",
    ),
    "records where no folder can be": (
        lambda folders: generate(path=str(folders.write("file", b"") / "records.jsonl"))(folders),
        ValueError,
        "`path` is '{tmp}/file/records.jsonl', whose folder cannot be made: File exists.",
    ),
    "reward that hangs": (
        reward(hangs, reward_seconds=0.2),
        RecordedError,
        "it took longer than 0.2 s, which is `reward_seconds`",
    ),
    "reward that raises": (
        reward(lambda response, ground_truth: 1 / 0),
        RecordedError,
        "ZeroDivisionError: division by zero",
    ),
    "reward that exits": (reward(leaves), RecordedError, "SystemExit: 3"),
    "reward of NaN": (
        reward(rewards_of(reward=math.nan)),
        RecordedError,
        "ValueError: The reward function `length_reward` returned {...}, where `reward` is nan. " + OTHER_REWARD,
    ),
    "reward without end": (
        reward(rewards_of(answer_reward=math.inf)),
        RecordedError,
        "ValueError: The reward function `length_reward` returned {...}, where `answer_reward` is inf. " + OTHER_REWARD,
    ),
    "reward of a number alone": (
        reward(lambda *_: 1.0),
        RecordedError,
        "TypeError: The reward function `<lambda>` returned 1.0, a float. " + OTHER_REWARD,
    ),
    # checkpoints
    "missing checkpoint": (
        command({"ckpt_path": "{tmp}/none.ckpt"}),
        RefusedError,
        "`ckpt_path` is '{tmp}/none.ckpt', but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.",
    ),
    "empty checkpoint": (
        checkpoint(lambda folders, good: b""),
        RefusedError,
        "`ckpt_path` is '{tmp}/bad.ckpt', which is no whole checkpoint (0 bytes): it is cut short, or something "
        "else. Take another one, such as the best.",
    ),
    "truncated checkpoint": (
        checkpoint(lambda folders, good: good[:5000]),
        RefusedError,
        "`ckpt_path` is '{tmp}/bad.ckpt', which is no whole checkpoint (5000 bytes): it is cut short, or something "
        "else. Take another one, such as the best.",
    ),
    "checkpoint with a hole": (
        checkpoint(lambda folders, good: bytes(2000) + good[2000:]),
        RefusedError,
        "`ckpt_path` is '{tmp}/bad.ckpt', which cannot be read: ... Take another one.",
    ),
    "folder for a checkpoint": (
        command({"ckpt_path": "{stock}/model"}),
        RefusedError,
        "`ckpt_path` is '{stock}/model', a folder without a checkpoint. Give the file itself, such as "
        "checkpoints/last.ckpt.",
    ),
    "sharded checkpoint": (
        command({"ckpt_path": "{tmp}"}, prepare=lambda folders: folders.write(".metadata", b"")),
        RefusedError,
        "`ckpt_path` is '{tmp}', a sharded checkpoint. Torch unpickles those, so loading it could run code from it. If "
        "you trust whoever made it, set `weights_only` to false.",
    ),
    "weights for a checkpoint": (
        checkpoint(lambda folders, good: tiny_model().state_dict()),
        RefusedError,
        "`ckpt_path` is '{tmp}/bad.ckpt', which is no checkpoint of a run: it has no `state_dict` beside a Lightning "
        "version. To start from weights, set `model` to a folder that `save_pretrained` made.",
    ),
    "checkpoint without an optimizer": (
        command({"ckpt_path": "{stock}/weights.ckpt"}),
        RefusedError,
        "`ckpt_path` is '{stock}/weights.ckpt', which has weights alone. To continue a training, take one with the "
        "optimizer.",
    ),
    "checkpoint of a wider model": (
        other_model(hidden_size=8),
        RefusedError,
        "The checkpoint is of another model: `model.model.embed_tokens.weight` is (131, 16) there and (131, 8) here, "
        "and 20 more. Set `model` to the one that it was trained from.",
    ),
    "checkpoint of a deeper model": (
        other_model(num_hidden_layers=1),
        RefusedError,
        "The checkpoint is of another model: `model.model.layers.1.self_attn.q_proj.weight` is there alone, and 8 "
        "more. Set `model` to the one that it was trained from.",
    ),
    "checkpoint of a flatter model": (
        other_model(num_hidden_layers=3),
        RefusedError,
        "The checkpoint is of another model: `model.model.layers.2.self_attn.q_proj.weight` is missing there, and 8 "
        "more. Set `model` to the one that it was trained from.",
    ),
    "checkpoint of another optimizer": (
        command({"ckpt_path": "{stock}/good.ckpt", "model.optimizer": "torch.optim.SGD", "model.optimizer.lr": 0.1}),
        RefusedError,
        "The checkpoint is of a run with another optimizer: it has no `dampening`, which this run's SGD needs. Set "
        "`optimizer` to the one of that run.",
    ),
    "checkpoint of other data": (
        command({"ckpt_path": "{stock}/good.ckpt", "data.batch_size": 3}),
        RefusedError,
        "The checkpoint was made with `batch_size` = 32, now it is 3: the run cannot continue at the same place in the "
        "data. Use 32, or start anew from the weights.",
    ),
    "truncated checkpoint in validate": (
        checkpoint(lambda folders, good: good[:5000], "validate"),
        RefusedError,
        "`ckpt_path` is '{tmp}/bad.ckpt', which is no whole checkpoint (5000 bytes): it is cut short, or something "
        "else. Take another one, such as the best.",
    ),
    # the log folder
    "log folder that is a file": (
        command(
            {"trainer.logger.save_dir": "{tmp}/file"},
            prepare=lambda folders: folders.write("file", b""),
        ),
        RefusedError,
        "The logs are to be written to {tmp}/file, but {tmp}/file is a file. Set `trainer.default_root_dir`, or "
        "the logger's `save_dir`, to another folder.",
    ),
    "log folder in a file, no logger": (
        command(
            {
                "trainer.logger": "false",
                "trainer.logger.save_dir": None,
                "trainer.default_root_dir": "{tmp}/file/runs",
            },
            prepare=lambda folders: folders.write("file", b""),
        ),
        RefusedError,
        "The logs are to be written to {tmp}/file/runs, but {tmp}/file is a file. Set `trainer.default_root_dir`, or "
        "the logger's `save_dir`, to another folder.",
    ),
    # configurations and settings
    "missing configuration": (
        command({"config": "{tmp}/none.yaml"}),
        RefusedError,
        "Parser key \"config\": File does not exist: '{tmp}/none.yaml'." + SETTINGS,
    ),
    "empty configuration": (
        command({"config": "{tmp}/a.yaml"}, prepare=lambda folders: folders.write("a.yaml", b"")),
        RefusedError,
        "a configuration holds `name: value` lines, but this one is empty." + SETTINGS,
    ),
    "configuration of a list": (
        command({"config": "{tmp}/a.yaml"}, prepare=lambda folders: folders.write("a.yaml", "- a\n- b\n")),
        RefusedError,
        "a configuration holds `name: value` lines, but this one is - a - b." + SETTINGS,
    ),
    "configuration that is no YAML": (
        command({"config": "{tmp}/a.yaml"}, prepare=lambda folders: folders.write("a.yaml", "a: [1\nb")),
        RefusedError,
        "Problems parsing config: ...line 1, column 4 did not find expected ',' or ']'..." + SETTINGS,
    ),
    "configuration in Latin-1": (
        command({"config": "{tmp}/a.yaml"}, prepare=lambda folders: folders.write("a.yaml", "a: é".encode("latin-1"))),
        RefusedError,
        "a configuration is not UTF-8 text (...). Save the file as UTF-8.",
    ),
    "unknown setting in a configuration": (
        command({"config": "{tmp}/a.yaml"}, prepare=lambda folders: folders.write("a.yaml", "data:\n  batchsize: 3\n")),
        RefusedError,
        "Subcommand 'fit' does not accept option 'data.batchsize'." + SETTINGS,
    ),
    "setting of another type": (
        command({"data.batch_size": "many"}),
        RefusedError,
        "Parser key \"data.batch_size\": Expected a <class 'int'>. Got value: many." + SETTINGS,
    ),
    "reward that cannot be imported": (
        command({"generation.reward_fn": "no.such.reward"}),
        RefusedError,
        "Parser key \"generation.reward_fn\": ...: No module named 'no'. Got value: no.such.reward." + SETTINGS,
    ),
    "unknown strategy": (
        command({"trainer.strategy": "ddpp"}),
        RefusedError,
        "You selected an invalid strategy name: `strategy='ddpp'`...",
    ),
    "the trainer's clipping": (
        command({"trainer.gradient_clip_val": 0.5}),
        RefusedError,
        "`trainer.gradient_clip_val` is 0.5, but this model steps by itself. Use `model.max_grad_norm`.",
    ),
    "the trainer's accumulation": (
        command({"trainer.accumulate_grad_batches": 2}),
        RefusedError,
        "`trainer.accumulate_grad_batches` is 2, but this model steps by itself. Use "
        "`data.gradient_accumulation_steps`.",
    ),
    "no device": (
        command({"trainer.devices": 0}),
        RefusedError,
        "`Trainer(devices='0')` value is not a valid input using cpu accelerator.",
    ),
    "unknown setting": (
        command({"model.lrr": 1}),
        RefusedError,
        "...lrr..." + SETTINGS,
    ),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A good model with its tokenizer, good rows, and the checkpoint of one step, with and without its optimizer."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(1)
    tiny_model().save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(SFTModule(str(folder / "model")), SFTDataModule(folder / "model", str(folder / "train.jsonl")))
    trainer.save_checkpoint(folder / "good.ckpt", weights_only=False)
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder


@pytest.fixture
def folders(tmp_path, stock) -> Folders:
    return Folders(tmp=tmp_path, stock=stock)


def told(provoke: Provoke, folders: Folders, error: type[Exception], capsys: pytest.CaptureFixture[str]) -> str:
    """The message, from the exception or from the program's last line."""
    with pytest.raises(error) as caught:
        provoke(folders)
    assert issubclass(caught.type, error)
    if error is not RefusedError:
        return str(caught.value)
    said = capsys.readouterr().err if caught.value.args == (2,) else str(caught.value)
    assert said.startswith("lightning-sft: error: ")
    assert "Traceback" not in said
    return said.removeprefix("lightning-sft: error: ").removesuffix("\n")


@pytest.mark.parametrize("problem", BAD)
def test_bad_input_is_refused_in_one_line_that_names_it(problem, folders, capsys):
    provoke, error, expected = BAD[problem]
    message = told(provoke, folders, error, capsys)
    for name, folder in folders.items():
        expected = expected.replace(f"{{{name}}}", str(folder))
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    assert re.fullmatch(pattern, message), f"\n{message}\nis not\n{expected}"  # `.` matches no line break


def test_the_table_is_as_long_as_promised():
    assert len(BAD) >= 60


def test_a_reward_that_hangs_does_not_stop_training(tmp_path):
    monitor = GenerationMonitor(hangs, num_prompts=1, sampling=Sampling(max_new_tokens=2), reward_seconds=0.2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    with pytest.warns(
        UserWarning, match=r"failed on 1 of 1 examples, which count as 0. The first: it took longer than"
    ):
        trainer.fit(SFTModule(tiny_config()), SFTDataModule(character_tokenizer(), ROWS, val_data=ROWS))
    assert trainer.global_step == 1
    assert trainer.callback_metrics["val/reward_failures"] == 1


# -- fuzzing -----------------------------------------------------------------------------------------------------------

SPECIAL = {"<eos>": 256, "<bos>": 257}


def byte_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, with the byte for its id; then `<eos>` 256, `<bos>` 257."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are shown as 256 and on, in turn
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown} | {chr(256 + turn): byte for turn, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(letters | SPECIAL, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_input_names=["input_ids"], **special
    )


TOKENIZERS = {bos: byte_tokenizer(bos) for bos in (False, True)}


def naive_ids(text: str, bos: bool) -> list[int]:
    """The bytes of a text, where special tokens that it spells out are special tokens."""
    special = SPECIAL if bos else {"<eos>": 256}
    parts = re.split("(" + "|".join(special) + ")", text)
    return [id_ for part in parts for id_ in ([special[part]] if part in special else part.encode())]


def naive_labels(prompt: str, output: str, bos: bool) -> list[int]:
    """What the mask should mark: the output and EOS, less a first token that has nothing before it."""
    labels = [*naive_ids(output, bos), 256]
    return labels if prompt or bos else labels[1:]


def marked(
    rows: list[dict], tokenizer: PreTrainedTokenizerFast, **options: object
) -> list[tuple[list[int], list[int]]]:
    """Each row's input ids with its last label, and the labels under its mask, as training gets them."""
    found = []
    module = SFTDataModule(tokenizer, rows, batch_size=len(rows), **options)
    module.setup("fit")
    for step in module.train_dataloader():
        for batch in step["microbatches"]:
            assert batch["response_mask"].shape == batch["labels"].shape == batch["input_ids"].shape
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["response_mask"], strict=True):
                end = int(mask.nonzero().max()) + 1  # padding comes after the response
                assert ids[1:end].tolist() == labels[: end - 1].tolist()
                found.append(([*ids[:1].tolist(), *labels[:end].tolist()], labels[mask].tolist()))
    return found


def assert_clear(error: Exception, *places: str) -> None:
    """One line, of a kind that users are told, which names where the trouble is."""
    assert isinstance(error, SettingsError), error
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1, message
    assert any(place in message for place in places), message


few = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
texts = st.text(max_size=12) | st.sampled_from(
    ["", "<eos>", "a<eos>b", "<bos>", "<bos><bos>a", "\r\n", "\0", "é\u2028😀"]
)


@few
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.booleans())
def test_any_text_is_masked_as_a_naive_tokenisation_says(pairs, bos):
    rows = [{"prompt": prompt, "output": output} for prompt, output in pairs]
    expected = []
    for prompt, output in pairs:
        start = naive_ids(prompt, bos)
        start = start if not bos or start[:1] == [257] else [257, *start]
        expected.append(([*start, *naive_ids(output, bos), 256], naive_labels(prompt, output, bos)))
    if not all(labels for _, labels in expected):
        with pytest.raises(ValueError, match="no response token to learn from") as caught:
            marked(rows, TOKENIZERS[bos], layout="padded")
        assert_clear(caught.value, "row ")
        return
    assert sorted(marked(rows, TOKENIZERS[bos], layout="padded")) == sorted(expected)
    for (prompt, output), (_, labels) in zip(pairs, expected, strict=True):
        if bos or prompt:
            assert TOKENIZERS[bos].decode(labels) == output + "<eos>"


@few
@given(st.text(st.characters(), max_size=8), st.text(st.characters(categories=["Cs", "L"]), max_size=8))
def test_text_with_lone_surrogates_is_reported_and_any_other_is_encoded(prompt, output):
    rows = [{"prompt": "p" + prompt, "output": output}]
    if re.search("[\ud800-\udfff]", prompt + output):
        with pytest.raises(ValueError, match="lone surrogate") as caught:
            marked(rows, TOKENIZERS[False], layout="padded")
        assert_clear(caught.value, "row 1 of `train_data`: `prompt`", "row 1 of `train_data`: `output`")
    else:
        assert marked(rows, TOKENIZERS[False], layout="padded")[0][1] == naive_labels("p" + prompt, output, bos=False)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
good_rows = st.fixed_dictionaries(
    {"prompt": texts, "output": texts}, optional={"ground_truth": texts | st.none(), "more": values}
)
columns = st.sampled_from(["prompt", "output", "ground_truth"]) | st.text(max_size=3)
any_rows = good_rows | st.dictionaries(columns, texts | values, max_size=4) | values


def is_read(data: object, rows: list[object] | None, *places: str) -> bool:
    """Whether there are rows, which then have their own texts under the mask, or a message, which is then clear."""
    try:
        module = SFTDataModule(TOKENIZERS[True], data)
        module.setup("fit")
    except Exception as error:
        assert_clear(error, *places)
        return False
    encoded = module._rows["train"][:]
    for prompt, output, ids, length in zip(
        *(encoded[name] for name in ("prompt", "output", "input_ids", "num_prompt_tokens")), strict=True
    ):
        start = naive_ids(prompt, True)
        assert ids[:length] == (start if start[:1] == [257] else [257, *start])
        assert ids[length:] == [*naive_ids(output, True), 256]
    if rows is not None:
        texts_of_rows = [(row["prompt"], row["output"]) for row in rows]
        assert texts_of_rows == list(zip(encoded["prompt"], encoded["output"], strict=True))
    return True


@pytest.mark.parametrize("kind", ["rows", "a.jsonl", "a.json"])
def test_any_json_is_read_as_it_stands_or_refused_with_its_place(kind):
    outcomes = set()

    @few
    @given(st.lists(good_rows, min_size=1, max_size=4) | st.lists(any_rows, min_size=1, max_size=4))
    def check(rows):
        if kind == "rows":
            outcomes.add(is_read(rows, rows, "row ", "`train_data` is "))
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, kind)
            text = json.dumps(rows) if kind == "a.json" else "".join(json.dumps(row) + "\n" for row in rows)
            path.write_text(text, encoding="utf-8")
            outcomes.add(is_read(str(path), rows, f" of {path}: ", f"cannot read {path}: "))

    check()
    assert outcomes == {True, False}


FILES = {
    "a.jsonl": GOOD * 2,
    "a.json": b"[" + GOOD + b"," + GOOD + b"]",
    "a.csv": b'prompt,output\na,b\n"c\n""",d\n',
}
pieces = st.binary(max_size=4) | st.sampled_from([b"", b"x", b"\n", b"\r", b'"', b",", b"{", b"]", b"\\ud800", b"null"])


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A good file with up to two cuts or patches."""
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(whole)))
        end = draw(st.integers(start, min(start + 3, len(whole))))
        whole = whole[:start] + draw(pieces) + whole[end:]
    return whole


@pytest.mark.parametrize("name", FILES)
def test_any_bytes_in_a_file_are_rows_or_refused_with_the_file(name):
    outcomes = set()

    @few
    @given(damaged(FILES[name]) | st.binary(max_size=40))
    def check(content):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(content)
            outcomes.add(is_read(str(path), None, str(path)))

    check()
    assert outcomes == {True, False}


def test_any_template_is_filled_or_refused():
    outcomes = set()

    @few
    @given(st.text(st.sampled_from("{}a!:[]. \n0"), max_size=8) | st.sampled_from(["{a}", "{{{a}}}", "a {a} {{"]))
    def check(template):
        rows = [{"prompt": "p", "output": "o", "a": "{a}"}]
        try:
            module = SFTDataModule(TOKENIZERS[False], rows, prompt_template=template)
            module.setup("fit")
        except Exception as error:
            assert_clear(error, "`prompt_template`")
            outcomes.add("refused")
            return
        outcomes.add("filled")
        assert re.fullmatch(r"(?:[^{}]|\{\{|\}\}|\{a\})*", template)
        filled = re.sub(r"\{\{|\}\}|\{a\}", lambda part: {"{{": "{", "}}": "}", "{a}": "{a}"}[part[0]], template)
        assert module._rows["train"]["prompt"][:] == [filled]

    check()
    assert outcomes == {"refused", "filled"}


# -- loading runs no code ----------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


@pytest.fixture
def trace(tmp_path) -> Path:
    """Where the payload leaves its trace; that it can, is seen first."""
    path = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    return path


def own_code(trace: Path, **config: object) -> dict[str, str]:
    """The files of a model that brings code of its own, which leaves a trace."""
    code = f"import os\nos.mkdir({str(trace)!r})\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class C(LlamaConfig): ...\nclass M(LlamaForCausalLM): ...\n"
    mapping = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    return {
        "own.py": code,
        "config.json": json.dumps({"model_type": "own", "auto_map": mapping} | config),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "T", "auto_map": mapping}),
    }


TRUST = "`model_kwargs` has `trust_remote_code: true`. Read that code first."


def test_a_checkpoint_that_holds_code_is_not_loaded(folders, trace, capsys):
    good = torch.load(folders["stock"] / "good.ckpt")
    for name in ("fit", "validate", "predict"):
        provoke = checkpoint(lambda folders, _: good | {"state_dict": Payload(trace)}, name)
        assert told(provoke, folders, RefusedError, capsys) == (
            f"`ckpt_path` is '{folders['tmp']}/bad.ckpt', which holds `posix.mkdir`, not tensors and plain values "
            "alone. Loading it could run code, so it is not loaded. If you trust whoever made it, set `weights_only` "
            "to false."
        )
    provoke = checkpoint(lambda folders, _: pickle.dumps(Payload(trace)))
    assert "which is no whole checkpoint" in told(provoke, folders, RefusedError, capsys)
    assert not trace.exists()


def test_weights_only_is_on_unless_the_user_says_otherwise(folders, trace, monkeypatch):
    seen = []

    def run(self, model, ckpt_path, weights_only):
        seen.append(weights_only)
        self.state.status = TrainerStatus.FINISHED

    monkeypatch.setattr(L.Trainer, "_run", run)
    for words in ({}, {"weights_only": "false"}):
        command({"ckpt_path": "{stock}/good.ckpt"} | words)(folders)
    checkpoint(lambda folders, _: {"state_dict": Payload(trace)}, weights_only="false")(folders)  # the user's word
    command({"ckpt_path": "https://example.org/good.ckpt"})(folders)  # Lightning would take code from there
    assert seen == [True, False, False, True]


def test_weights_that_hold_code_are_not_loaded(folders, trace):
    for content in (pickle.dumps({"a": Payload(trace)}, protocol=2), None):
        shutil.rmtree(folders["tmp"] / "model", ignore_errors=True)
        shutil.copytree(folders["stock"] / "model", folders["tmp"] / "model")
        (folders["tmp"] / "model" / "model.safetensors").unlink()
        path = folders["tmp"] / "model" / "pytorch_model.bin"
        path.write_bytes(content) if content else torch.save({"a": Payload(trace)}, path)
        with pytest.raises(ValueError, match=r"its weights are a pickle that holds .*, which could run code\. Ask"):
            SFTModule(str(folders["tmp"] / "model")).configure_model()
    assert not trace.exists()


def test_code_of_a_model_or_tokenizer_runs_only_if_the_user_says_so(folders, trace, capsys):
    for name, content in own_code(trace).items():
        folders.write(f"own/{name}", content)
    folder = f"{folders['tmp']}/own"
    with pytest.raises(ValueError, match=re.escape(TRUST)):
        SFTModule(folder).configure_model()
    with pytest.raises(ValueError, match=r"it brings Python code of its own. If you trust it, load it with `AutoTok"):
        SFTDataModule(folder, ROWS).setup("fit")
    words = {"model.model": folder, "data.tokenizer": "{stock}/model"}
    assert told(command(words), folders, RefusedError, capsys).endswith(TRUST)
    assert not trace.exists()
    with pytest.raises(ValueError, match="cannot be loaded"):  # there are no weights, but now the code is read
        SFTModule(folder, model_kwargs={"trust_remote_code": True}).configure_model()
    assert trace.exists()


def test_code_beside_a_known_model_is_not_run(folders, trace):
    shutil.copytree(folders["stock"] / "model", folders["tmp"] / "own")
    config = json.loads((folders["tmp"] / "own" / "config.json").read_text())
    for name, content in own_code(trace, **config).items():
        if name != "tokenizer_config.json":
            folders.write(f"own/{name}", content)
    module = SFTModule(str(folders["tmp"] / "own"))
    module.configure_model()
    assert type(module.model) is LlamaForCausalLM
    assert not trace.exists()


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.npy", "set/train.pkl", "set/train.npy", "set/set.py"])
def test_data_of_a_pickled_kind_is_not_read(folders, trace, name):
    content = own_code(trace)["own.py"] if name.endswith(".py") else pickle.dumps(Payload(trace))
    path = folders.write(name, content)
    data = str(path.parent if name.startswith("set") else path)
    with pytest.raises(ValueError, match=r"^`train_data` is ") as caught:
        SFTDataModule(character_tokenizer(), data).setup("fit")
    assert_clear(caught.value, data)
    assert not trace.exists()
