"""Rows to try the package with: generated ones, which need no network, and the form of GSM8K's."""

from lightning_sft.examples.arithmetic import word_problems, word_tokenizer
from lightning_sft.examples.gsm8k import r1_zero_row
from lightning_sft.examples.stories import story_questions

__all__ = ["r1_zero_row", "story_questions", "word_problems", "word_tokenizer"]
