"""From rows to token ids: rows are rendered as text and tokenised, and the over-long ones dropped or cut."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_choice, check_integer, check_type
from lightning_sft.data.cache import code_hash
from lightning_sft.data.chat.chat_encoding import ChatEncoder, EncodedConversation
from lightning_sft.data.chat.notices import Notice
from lightning_sft.data.encoded_example import EncodedExample, ExampleText, to_table
from lightning_sft.data.rows.bad_rows import BadRows, RowProblems
from lightning_sft.data.rows.row_format import AnyRow, PlainRow, RowFormat, TokenRow
from lightning_sft.data.rows.sources import Source
from lightning_sft.data.rows.token_rows import check_vocabulary, last_stretch, num_token_ids
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.tokenization import decode_ids, encode_examples, encode_texts
from lightning_sft.errors import SettingsError, shorten

TooLong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True)
class Encoding:
    """How rows become token ids; `SFTDataModule` explains the settings.

    A row whose prompt alone leaves no room for a response is dropped under `truncate`, too. One that is too long is not
    malformed: `bad_rows` does not concern it.
    """

    max_length: int | None = None
    too_long: TooLong = "error"
    append_eos: bool = True
    bad_rows: BadRows = "error"

    def __post_init__(self) -> None:
        check_integer("max_length", self.max_length, optional=True)
        if self.max_length is not None and self.max_length < 2:
            raise SettingsError(
                f"`max_length` is {self.max_length}, expected at least 2: a prompt token and a response token."
            )
        check_choice("too_long", self.too_long, TooLong)
        if self.max_length is None and self.too_long != "error":
            raise SettingsError(
                f"`too_long` is {self.too_long!r}, but without `max_length` no row is too long. Leave it out, or give "
                "`max_length`."
            )
        check_type("append_eos", self.append_eos, bool, "true or false")
        check_choice("bad_rows", self.bad_rows, BadRows)

    @property
    def limit_in_words(self) -> str:
        """What is wrong with the rows that are dropped or cut."""
        return f"longer than `max_length` = {self.max_length} tokens"


@dataclass
class RowEncoder:
    """Turns rows into token ids."""

    row_format: RowFormat
    tokenizer: PreTrainedTokenizerBase
    encoding: Encoding

    def __call__(self, batch: dict[str, list[Any]], indices: list[int], source: Source, keep_name: bool) -> pa.Table:
        """The examples of a batch of a source's rows, as `datasets.Dataset.map` calls it.

        With `keep_name` their locations say of which source they are.
        """
        return to_table(self.encode(source.decode(batch, indices), None if keep_name else source.name), indices)

    def encode(self, rows: Iterable[tuple[str, AnyRow]], only_source: str | None = None) -> list[EncodedExample]:
        """Tokenise rows, each with its location, such as `line 3 of train.jsonl`. Some become several examples.

        If all rows are of one source, whose name `only_source` is, the locations of examples leave it out.
        """
        chat_encoder = ChatEncoder(self.tokenizer, self.row_format.train_on_turns, self.encoding.append_eos)
        problems = RowProblems(self.encoding.bad_rows)
        texts: list[ExampleText] = []
        for number, (location, row) in enumerate(rows):
            with problems.caught(number, location):
                texts += self._texts(number, location, row, chat_encoder)
        examples: list[EncodedExample] = []
        for text, tokens in zip(texts, self._tokens(texts, chat_encoder), strict=True):
            with problems.caught(text.row, text.location):
                examples.append(self._checked(text, tokens, only_source))
        examples = [self._within_length(each) for each in examples if each.text.row not in problems.found]
        for number, bad in problems.found.items():
            location = _short_location(bad.location, only_source)
            nothing = ExampleText(number, bad.location, "", "", ""), Example([], 0, location=location)
            examples.append(EncodedExample(*nothing, is_dropped=True, problem=bad.problem))
        return sorted(examples, key=lambda each: each.text.row)

    def _texts(self, number: int, location: str, row: AnyRow, chat_encoder: ChatEncoder) -> list[ExampleText]:
        rendered = self.row_format.render(row)
        unused = rendered.unused_columns
        if isinstance(rendered, PlainRow):
            said = (rendered.prompt, rendered.output, rendered.ground_truth)
            return [ExampleText(number, location, *said, is_whole=rendered.is_whole, unused_columns=unused)]
        if isinstance(rendered, TokenRow):
            example = rendered.example
            check_vocabulary(example.input_ids, self._num_ids)
            start, end = last_stretch(example)
            prompt = decode_ids(self.tokenizer, example.input_ids[:start])
            output = decode_ids(self.tokenizer, example.input_ids[start:end])
            answer = rendered.ground_truth
            return [ExampleText(number, location, prompt, output, answer, tokens=example, unused_columns=unused)]
        written = chat_encoder.write(rendered.conversation)
        answers = [each.answer for each in written]
        if rendered.ground_truth is not None:
            answers[-1] = rendered.ground_truth
        return [
            ExampleText(number, location, each.prompt, each.output, answer, each, unused_columns=unused)
            for each, answer in zip(written, answers, strict=True)
        ]

    @cached_property
    def _num_ids(self) -> int:
        return num_token_ids(self.tokenizer)

    def _tokens(
        self, texts: Sequence[ExampleText], chat_encoder: ChatEncoder
    ) -> Iterator[Example | EncodedConversation | SettingsError]:
        """The tokens of each text, or why it has none."""
        append_eos = self.encoding.append_eos
        plain = [text for text in texts if not text.as_written and not text.is_whole]
        prompts, outputs = [text.prompt for text in plain], [text.output for text in plain]
        plain_examples = iter(encode_examples(prompts, outputs, self.tokenizer, append_eos))
        wholes = [text.output for text in texts if text.is_whole]
        whole_examples = iter(encode_texts(wholes, self.tokenizer, append_eos))
        chat_examples = chat_encoder.encode([text.conversation for text in texts if text.conversation is not None])
        for text in texts:
            if text.conversation is not None:
                yield next(chat_examples)
            else:
                yield text.tokens or next(whole_examples if text.is_whole else plain_examples)

    def _checked(
        self, text: ExampleText, tokens: Example | EncodedConversation | SettingsError, only_source: str | None
    ) -> EncodedExample:
        """The example; an error if there is nothing to learn in it."""
        if isinstance(tokens, SettingsError):
            raise tokens
        example, notices = (tokens, []) if isinstance(tokens, Example) else (tokens.example, tokens.notices)
        if self.row_format.train_on_prompts:
            _check_can_be_learnt_whole(text)
            example = example.learnt_whole()
        if not example.num_response_labels:
            ending = ", and its EOS has no token before it. Remove the row."
            if not self.encoding.append_eos:
                ending = ". Remove the row, or set `append_eos=True`."
            raise SettingsError(f"no response token to learn from; the response is {shorten(text.output)}{ending}")
        if not text.output.strip() and text.tokens is None:
            notices = [*notices, Notice("empty", repr(text.prompt[-40:]))]
        location = _short_location(text.location, only_source) + _turn_in_words(text)
        return EncodedExample(text, replace(example, location=location), notices=notices)

    def _within_length(self, encoded: EncodedExample) -> EncodedExample:
        """The example, cut or marked as dropped if it is too long."""
        max_length, example = self.encoding.max_length, encoded.example
        if max_length is None or len(example.input_ids) <= max_length:
            return encoded
        if self.encoding.too_long == "error":
            raise SettingsError(
                f"{encoded.text.location}: {len(example.input_ids)} tokens ({example.num_prompt_tokens} of the prompt) "
                f'exceed `max_length` = {max_length}. Raise `max_length`, or set `too_long` to "drop" or "truncate".'
            )
        truncated = example.truncated(max_length)
        if self.encoding.too_long == "drop" or not truncated.num_response_labels:
            text = replace(encoded.text, prompt="", output="", ground_truth="")  # nothing of it is stored
            return EncodedExample(text, Example([], 0, location=example.location), is_dropped=True)
        return replace(encoded, example=truncated, is_truncated=True)

    def fingerprint(self) -> str:
        """Changes with the tokenizer's content, the options, and the code that reads and encodes."""
        tokenizer, row_format = self.tokenizer, self.row_format
        if getattr(tokenizer, "backend_tokenizer", None) is not None:
            # Before the tokens stands how it pads and truncates, which each call leaves behind. `Hasher` takes seconds
            # for so many parts, so the text is hashed as a whole.
            _, _, content = tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')
        else:
            content = [sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs]
        special = (type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.split_special_tokens)
        template = (tokenizer.chat_template, tokenizer.special_tokens_map)
        # A function of a module is hashed by its name alone, so the module's code is added.
        functions = (row_format.row_transform, row_format.row_filter)
        modules = [sys.modules.get(getattr(getattr(each, "func", each), "__module__", "")) for each in functions]
        files = [getattr(module, "__file__", None) for module in modules]
        code = [code_hash(), *(Path(file).read_bytes() if file else b"" for file in files)]
        return str(Hasher.hash([code, content, special, template, (row_format, self.encoding)]))


def _check_can_be_learnt_whole(text: ExampleText) -> None:
    """Refuse a row that says itself that not all of it is learnt, or that becomes examples with much in common."""
    if text.tokens is not None and text.tokens.num_response_labels < len(text.tokens.input_ids) - 1:
        why = "the row is tokenised, and its labels or masks leave tokens out. Remove these columns"
    elif text.conversation is not None and not text.conversation.is_whole:
        why = (
            "with this chat template each turn of the conversation is an example of its own, so that earlier turns "
            "would be learnt several times. Give another `chat_template`"
        )
    elif text.conversation is not None and text.conversation.has_unlearnt_turns:
        why = "a turn has the `weight` 0 (or `train` false, or similar). Remove the weight"
    else:
        return
    raise SettingsError(f"`train_on_prompts` is true, but {why}, or set `train_on_prompts` to false.")


def _short_location(location: str, only_source: str | None) -> str:
    return location.removesuffix(f" of {only_source}")


def _turn_in_words(text: ExampleText) -> str:
    """Which turn the example is of, if its row becomes several."""
    if text.conversation is None or text.conversation.is_whole:
        return ""
    return f", turn {text.conversation.turns[-1].index + 1}"
