"""Settings of the data that cannot be used: templates, tokenizers, lengths and numbers."""

import numpy as np
import pytest
from support.models import character_tokenizer
from support.refusals import ROWS, Provoke, Refusal, data, each, write
from support.untrusted import own_code, trace_of_payload
from transformers import PreTrainedTokenizerFast

from lightning_sft import SFTDataModule, tokenize_prompt_and_output
from lightning_sft.errors import MissingFileError, SettingsError, SettingsTypeError


def template(content: bytes) -> Provoke:
    """A prompt template in a file."""
    return lambda folder: data(prompt_template=str(write(folder / "template.txt", content)))(folder)


def without_eos() -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


TEMPLATES = {
    "template without column": Refusal(
        data(prompt_template="Question:"),
        "`prompt_template` is 'Question:', which has no {column} in it and is no file either. Give a text such as "
        "'Question: {question}', or the path of a file with such a text.",
        MissingFileError,
    ),
    "template with an unknown column": Refusal(
        data(prompt_template="{question}"),
        "row 1 of `train_data`: no value for `question` (`prompt_template`). The row has ['output', 'prompt'].",
    ),
    "template of a number": Refusal(
        data(prompt_template=5),
        "`prompt_template` is 5 of type int, expected a text or the path of a file, as a string.",
        SettingsTypeError,
    ),
    "template file without column": Refusal(
        template(b"Question:"), "`prompt_template` has no {column} in it, so all prompts would be the same."
    ),
    "template file that cannot be read": Refusal(
        data(prompt_template="/proc/self/mem"),
        "`prompt_template` is '/proc/self/mem', which cannot be read: Input/output error.",
    ),
    "template file in Latin-1": Refusal(
        template("é {prompt}".encode("latin-1")),
        "`prompt_template` is '{tmp}/template.txt', which is not UTF-8 text (invalid continuation byte). Save the file "
        "as UTF-8.",
    ),
}

TOKENIZERS = {
    "no tokenizer": Refusal(data(tokenizer=None), "`tokenizer` is missing; expected a name, a path or a tokenizer."),
    "tokenizer of a number": Refusal(
        data(tokenizer=5), "`tokenizer` is 5 of type int, expected a name, a path or a tokenizer.", SettingsTypeError
    ),
    "missing tokenizer": Refusal(
        data(tokenizer="{tmp}/none"), "`tokenizer` is '{tmp}/none', which cannot be loaded: there is no such folder."
    ),
    "tokenizer folder of nothing": Refusal(
        data(tokenizer="{tmp}"), "`tokenizer` is '{tmp}', which cannot be loaded: ..."
    ),
    "truncated tokenizer": Refusal(
        lambda folder: data(tokenizer=str(write(folder / "t/tokenizer.json", "{").parent))(folder),
        "`tokenizer` is '{tmp}/t', which cannot be loaded: ...",
    ),
    "tokenizer without EOS": Refusal(
        data(tokenizer=without_eos()),
        "`append_eos` is True, but the tokenizer has no EOS token. Set `tokenizer.eos_token`, or pass "
        "`append_eos=False` (the model then never learns to stop).",
    ),
    "one prompt instead of a list": Refusal(
        lambda folder: tokenize_prompt_and_output("ab", ["c", "d"], character_tokenizer()),
        "Expected a list of prompts, but got one string, 'ab'. Put it into a list.",
        SettingsTypeError,
    ),
    "output that is no text": Refusal(
        lambda folder: tokenize_prompt_and_output(["a", "b"], ["c", None], character_tokenizer()),
        "output 1 is None of type NoneType, expected a string.",
        SettingsTypeError,
    ),
    "prompt with a lone surrogate": Refusal(
        lambda folder: tokenize_prompt_and_output(["a\udc80"], ["c"], character_tokenizer()),
        "prompt 0 holds a lone surrogate, which is not text: 'a\\udc80'.",
    ),
}

SETTINGS = {
    "row too long": Refusal(
        data(max_length=5),
        "row 1 of `train_data`: 6 tokens (2 of the prompt) exceed `max_length` = 5. Raise `max_length`, or set "
        '`too_long` to "drop" or "truncate".',
    ),
    "all rows too long": Refusal(
        data(max_length=5, too_long="drop"),
        "`train_data`: all 4 rows are longer than `max_length` = 5 tokens. Raise `max_length`.",
    ),
    "row longer than a microbatch": Refusal(
        data(max_tokens_per_microbatch=4),
        "row 1 of `train_data`: `max_tokens_per_microbatch` is 4, but example 0 has 5 tokens. Raise "
        "`max_tokens_per_microbatch` to at least that, or lower `max_length`.",
    ),
    "max_length of 1": Refusal(
        data(max_length=1), "`max_length` is 1, expected at least 2: a prompt token and a response token."
    ),
    "max_length of text": Refusal(
        data(max_length="512"), "`max_length` is '512' of type str, expected a whole number.", SettingsTypeError
    ),
    "batch_size of 0": Refusal(data(batch_size=0), "`batch_size` is 0, expected at least 1."),
    "batch_size of a half": Refusal(
        data(batch_size=4.5), "`batch_size` is 4.5 of type float, expected a whole number.", SettingsTypeError
    ),
    "batch_size of none": Refusal(
        data(batch_size=None), "`batch_size` is None of type NoneType, expected a whole number.", SettingsTypeError
    ),
    "batch_size of true": Refusal(
        data(batch_size=True), "`batch_size` is True of type bool, expected a whole number.", SettingsTypeError
    ),
    "two rules for microbatches": Refusal(
        data(gradient_accumulation_steps=2, max_tokens_per_microbatch=64),
        "`gradient_accumulation_steps` is 2 and `max_tokens_per_microbatch` is 64, but both determine the "
        "microbatches. Give one of them.",
    ),
    "val_fraction of 1": Refusal(
        data(val_fraction=1.0), "`val_fraction` is 1.0, expected a fraction of the rows: at least 0, below 1."
    ),
    "val_fraction of text": Refusal(
        data(val_fraction="0.1"),
        "`val_fraction` is '0.1' of type str, expected a fraction of the rows: at least 0, below 1.",
        SettingsTypeError,
    ),
    "val_fraction of one row": Refusal(
        data(train_data=ROWS[:1], val_fraction=0.5),
        "`val_fraction` is 0.5, but `train_data` has 1 row, of which none would be left to train on. Lower it, or give "
        "`val_data`.",
    ),
    "val_fraction of all rows, rounded up": Refusal(
        data(val_fraction=np.float32(0.8)),
        "`val_fraction` is 0.8..., but `train_data` has 4 rows, of which none would be left to train on. Lower it, or "
        "give `val_data`.",
    ),
    "two sources of validation": Refusal(
        data(val_data=ROWS, val_fraction=0.1),
        "Both `val_data` and `val_fraction` are given; the validation rows come from one of them. Leave one out.",
    ),
    "shuffle_buffer without streaming": Refusal(
        data(shuffle_buffer=5),
        "`shuffle_buffer` is 5, but only rows that are streamed are shuffled in blocks. Leave it out, or set "
        "`streaming` to true.",
    ),
    "too_long without max_length": Refusal(
        data(too_long="drop"),
        "`too_long` is 'drop', but without `max_length` no row is too long. Leave it out, or give `max_length`.",
    ),
    "unknown too_long": Refusal(data(too_long="cut"), "`too_long` is 'cut', expected one of error, drop, truncate."),
    "unknown layout": Refusal(data(layout="flat"), "`layout` is 'flat', expected one of packed, padded."),
    "append_eos of text": Refusal(
        data(append_eos="no"), "`append_eos` is 'no' of type str, expected true or false.", SettingsTypeError
    ),
    "negative seed": Refusal(data(seed=-1), "`seed` is -1, expected at least 0."),
    "num_proc of 0": Refusal(data(num_proc=0), "`num_proc` is 0, expected at least 1."),
    "two ways to name the columns of a prompt": Refusal(
        data(prompt_field="question", prompt_template="{prompt}"),
        "Both `prompt_template` and `prompt_field` are given, but the template names the columns of a prompt itself. "
        "Leave out the field, or set the template to null.",
    ),
    "prompts of an unknown stage": Refusal(
        lambda folder: SFTDataModule(character_tokenizer(), ROWS).prompts("eval"),
        "`stage` is 'eval', expected one of fit, validate, test, predict.",
    ),
    "less than no prompts": Refusal(
        lambda folder: SFTDataModule(character_tokenizer(), ROWS).prompts("fit", -1),
        "`num_prompts` is -1, expected at least 0.",
    ),
    "negative num_workers": Refusal(data(num_workers=-1), "`num_workers` is -1, expected at least 0."),
}


@each(TEMPLATES)
def test_a_template_that_cannot_be_filled_is_refused(refusal, tmp_path):
    refusal.check(tmp_path)


@each(TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used_is_refused(refusal, tmp_path):
    refusal.check(tmp_path)


@each(SETTINGS)
def test_a_setting_of_the_wrong_type_or_out_of_range_is_named(refusal, tmp_path):
    refusal.check(tmp_path)


def test_code_of_a_tokenizer_is_not_run(tmp_path):
    trace = trace_of_payload(tmp_path)
    for name, content in own_code(trace).items():
        write(tmp_path / "own" / name, content)
    with pytest.raises(ValueError, match=r"it brings Python code of its own. If you trust it, load it with `AutoTok"):
        SFTDataModule(str(tmp_path / "own"), ROWS).setup("fit")
    assert not trace.exists()


def test_an_error_of_the_process_that_prepares_the_rows_is_raised_by_all(monkeypatch):
    """Raised while the others wait for it, it would end them with a traceback about a lost connection."""
    kept = []

    def gather(errors, error):
        kept.append(error)
        errors[:] = [kept[0], error]

    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    first, second = (SFTDataModule(character_tokenizer(), "missing.jsonl") for _ in range(2))
    first.prepare_data()
    for process in (first, second):
        with pytest.raises(SettingsError, match="but there is no such file"):
            process.setup("fit")
    assert kept[1] is None
