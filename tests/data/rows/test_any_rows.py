"""Fuzzing: whatever rows hold, they are refused in one clear line, or the mask marks their outputs and nothing else."""

import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.refusals import assert_clear
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_sft import SFTDataModule

GOOD = b'{"prompt": "a", "output": "b"}\n'
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


def naive_response(output: str, bos: bool) -> list[int]:
    """The output and, unless it ends in one itself, an EOS."""
    return naive_ids(output if output.endswith("<eos>") else output + "<eos>", bos)


def naive_labels(prompt: str, output: str, bos: bool) -> list[int]:
    """What the mask should mark: the response, less a first token that has nothing before it."""
    labels = naive_response(output, bos)
    return labels if prompt or bos else labels[1:]


def marked(
    rows: list[dict], tokenizer: PreTrainedTokenizerFast, **options: object
) -> list[tuple[list[int], list[int]]]:
    """Each row's input ids with its last label, and the labels under its mask, as training gets them."""
    found = []
    module = SFTDataModule(tokenizer, rows, batch_size=len(rows), **options)
    module.setup("fit")
    for step in module.train_dataloader():
        for batch in step.microbatches:
            assert batch.response_mask.shape == batch.labels.shape == batch.input_ids.shape
            for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.response_mask, strict=True):
                end = int(mask.nonzero().max()) + 1  # padding comes after the response
                assert ids[1:end].tolist() == labels[: end - 1].tolist()
                found.append(([*ids[:1].tolist(), *labels[:end].tolist()], labels[mask].tolist()))
    return found


few = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
texts = st.text(max_size=12) | st.sampled_from(
    ["", "<eos>", "a<eos>", "a<eos>b", "<bos>", "<bos><bos>a", "\r\n", "\0", "é\u2028😀"]
)


@few
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.booleans())
def test_any_text_is_masked_as_a_naive_tokenisation_says(pairs, bos):
    rows = [{"prompt": prompt, "output": output} for prompt, output in pairs]
    expected = []
    for prompt, output in pairs:
        start = naive_ids(prompt, bos)
        start = start if not bos or start[:1] == [257] else [257, *start]
        expected.append(([*start, *naive_response(output, bos)], naive_labels(prompt, output, bos)))
    if not all(labels for _, labels in expected):
        with pytest.raises(ValueError, match="no response token to learn from") as caught:
            marked(rows, TOKENIZERS[bos], layout="padded")
        assert_clear(caught.value, "row ")
        return
    assert sorted(marked(rows, TOKENIZERS[bos], layout="padded")) == sorted(expected)
    for (prompt, output), (_, labels) in zip(pairs, expected, strict=True):
        if bos or prompt:
            assert TOKENIZERS[bos].decode(labels) == output.removesuffix("<eos>") + "<eos>"


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
    encoded = module.training_rows.rows[:]
    for prompt, output, ids, length in zip(
        *(encoded[name] for name in ("prompt", "output", "input_ids", "num_prompt_tokens")), strict=True
    ):
        start = naive_ids(prompt, True)
        assert ids[:length] == (start if start[:1] == [257] else [257, *start])
        assert ids[length:] == naive_response(output, True)
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


@few
@given(st.lists(good_rows | any_rows, min_size=1, max_size=6))
def test_bad_rows_are_left_out_one_by_one_and_all_others_stay(rows):
    rows = [row for row in rows if isinstance(row, dict)]
    good = [row for row in rows if is_read([row], [row], "row ")]
    if not good:
        return
    module = SFTDataModule(TOKENIZERS[True], rows, bad_rows="drop")
    split = module.preview(0).splits["train"]
    assert (len(split.num_tokens), split.report.bad_rows.total) == (len(good), len(rows) - len(good))
    assert module.training_rows.rows["output"][:] == [row["output"] for row in good]


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
        assert module.training_rows.rows["prompt"][:] == [filled]

    check()
    assert outcomes == {"refused", "filled"}
