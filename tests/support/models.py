"""Tiny models and tokenizers, built in process."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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


def save_tiny_model(folder: Path, **changes: object) -> None:
    """A tiny model and its tokenizer, as `from_pretrained` takes them."""
    tiny_model(**changes).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
