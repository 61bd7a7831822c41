"""Tiny models and tokenizers built in process; real data where it lies beside the checkout."""

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may ask a hub; read when its client is imported

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins by ignoring it
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


_LONGEST = ["test_resume", "test_cli", "test_splits", "test_notebooks", "test_module", "test_lora"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: otherwise one of the two workers is left with one of them in the end."""
    items.sort(key=lambda item: [*_LONGEST, item.path.stem].index(item.path.stem))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep cached data sets out of the user's home."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets_cache")


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A handler that is left behind would keep worker processes of later tests from being ended."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA.name} with real data is not beside the checkout")
    return SHARED_DATA


def character_tokenizer(bos: bool = False, pad: bool = False) -> PreTrainedTokenizerFast:
    """One token a character: `chr(i)` has the id `i` below 128; then `<eos>` 128, `<bos>` 129, `<pad>` 130."""
    vocab = {chr(i): i for i in range(128)} | {"<eos>": 128, "<bos>": 129, "<pad>": 130}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=chr(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<eos>", "unk_token": chr(0)}
    if bos:
        special["bos_token"] = "<bos>"
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 129)])
    if pad:
        special["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )


def tiny_config(**changes: object) -> dict[str, object]:
    """A Llama small enough for a test, for the character tokenizer."""
    return {
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    } | changes


def tiny_model(**changes: object) -> LlamaForCausalLM:
    config = tiny_config(**changes)
    del config["model_type"]
    return LlamaForCausalLM(LlamaConfig(**config))
