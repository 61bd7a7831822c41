"""The format of rows: which columns are the prompt, the output and the ground truth, or a conversation."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_sft.checks import check_callable, check_choice, check_type
from lightning_sft.data.chat.chat_encoding import TrainOnTurns
from lightning_sft.data.chat.conversation import Conversation, check_variables, is_asked, read_conversation
from lightning_sft.data.rows.bad_rows import FilteredRowError
from lightning_sft.data.rows.columns import (
    CONVERSATIONS,
    EASILY_MISSED,
    MISSED_IN_CONVERSATIONS,
    PICTURES,
    TEXTS,
    WRITTEN_BY_AS_CHAT,
    is_missed,
    unused_beside_tokens,
    way_out,
)
from lightning_sft.data.rows.prompt_template import read_prompt_template, template_columns
from lightning_sft.data.rows.readers import UnreadableRow
from lightning_sft.data.rows.token_rows import IDS, read_prompt_tokens, read_tokens
from lightning_sft.data.tokens.example import Example
from lightning_sft.data.tokens.texts import check_is_text
from lightning_sft.errors import SettingsError, one_line, shorten

Row: TypeAlias = Mapping[str, Any]
AnyRow: TypeAlias = Row | UnreadableRow


# What a row says. Everywhere `ground_truth` is the reference answer, None if the row has none, and `unused_columns` are
# columns of the row that people mean to be used, and that are not.


@dataclass(frozen=True)
class PlainRow:
    """A prompt and the output that is to be learnt; or, without a prompt, a text that is learnt as a whole."""

    prompt: str
    output: str
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()
    is_whole: bool = False


@dataclass(frozen=True)
class ChatRow:
    """A conversation, which the chat template is to write."""

    conversation: Conversation
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenRow:
    """A row that is tokenised already."""

    example: Example
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Name the argument whose function fails. A ready one raises a `SettingsError`, which says enough."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(f"`{argument}` failed: {type(error).__name__}: {one_line(error)}") from error


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a row are its prompt, output and ground truth; `SFTDataModule` explains the settings.

    The prompt template may also be the path of a file, whose last line break is dropped. A row's own
    `chat_template_kwargs` come first.

    A row with `input_ids` is tokenised already, and one with `messages`, `conversations` or `conversation` is a
    conversation, unless an argument names the columns of its text. So is a row whose prompt or output is a list of
    messages.
    """

    prompt_field: str = "prompt"
    output_field: str = "output"
    ground_truth_field: str = "ground_truth"
    prompt_template: str | None = None
    row_transform: Callable[[dict[str, Any]], Row] | None = None
    train_on_turns: TrainOnTurns = "all"
    chat_template_kwargs: Mapping[str, Any] | None = None
    as_chat: bool = False
    row_filter: Callable[[dict[str, Any]], bool] | None = None
    text_field: str | None = None
    train_on_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_field", "output_field", "ground_truth_field"):
            check_type(name, getattr(self, name), str, "the name of a column")
        check_type("text_field", self.text_field, str, "the name of a column", optional=True)
        check_callable("row_transform", self.row_transform, "a function", optional=True)
        check_callable("row_filter", self.row_filter, "a function", optional=True)
        if self.prompt_template is not None:
            check_type("prompt_template", self.prompt_template, str, "a text or the path of a file, as a string")
            object.__setattr__(self, "prompt_template", read_prompt_template(self.prompt_template))
        check_choice("train_on_turns", self.train_on_turns, TrainOnTurns)
        if self.chat_template_kwargs is not None:
            check_type("chat_template_kwargs", self.chat_template_kwargs, Mapping, "values by their names")
            check_variables(self.chat_template_kwargs)
        check_type("as_chat", self.as_chat, bool, "true or false")
        check_type("train_on_prompts", self.train_on_prompts, bool, "true or false")
        if self.train_on_prompts and self.train_on_turns != "all":
            raise SettingsError(
                f"`train_on_prompts` is true, which learns all turns, but `train_on_turns` is {self.train_on_turns!r}. "
                "Leave one out."
            )
        self._check_columns()

    def _check_columns(self) -> None:
        if self.prompt_template is not None and self.prompt_field != RowFormat.prompt_field:
            raise SettingsError(
                "Both `prompt_template` and `prompt_field` are given, but the template names the columns of a prompt "
                "itself. Leave out the field, or set the template to null."
            )
        others = [name for name in ("prompt_field", "output_field") if getattr(self, name) != getattr(RowFormat, name)]
        others += [name for name in ("prompt_template", "as_chat") if getattr(self, name)]
        if self.text_field is not None and others:
            raise SettingsError(
                f"Both `text_field` and `{others[0]}` are given, but a text that is learnt as a whole has neither "
                "prompt nor output. Leave one out."
            )

    def settings_of_conversations(self) -> list[str]:
        """The names of settings that are given, and have no effect unless a row is a conversation."""
        names = ("train_on_turns", "chat_template_kwargs")
        return [name for name in names if getattr(self, name) not in (getattr(RowFormat, name), {})]

    def render(self, row: AnyRow) -> PlainRow | ChatRow | TokenRow:
        """What a row says that is to be learnt."""
        row = self._transformed(row)
        if self._has_tokens(row):
            return TokenRow(read_tokens(row), self._ground_truth(row), unused_beside_tokens(row))
        self._refuse_preferences(row)
        if (conversation := self._conversation(row)) is not None:
            return ChatRow(conversation, self._ground_truth(row), self._unused_columns(row, MISSED_IN_CONVERSATIONS))
        if (text := self._whole_text(row)) is not None:
            return PlainRow("", text, self._ground_truth(row), is_whole=True)
        prompt, output = self._prompt(row), self._text(row, self._output_column(row), "output_field")
        ground_truth = self._ground_truth(row)
        if self.as_chat:
            return self._chat_row(row, prompt, output, ground_truth)
        return PlainRow(prompt, output, output if ground_truth is None else ground_truth, self._unused_columns(row))

    def render_prompt(self, row: AnyRow) -> PlainRow | ChatRow | TokenRow:
        """What a row says that a model is to go on from, without its output. A text goes on where it ends."""
        row = self._transformed(row)
        if self._has_tokens(row):
            return TokenRow(read_prompt_tokens(row), self._ground_truth(row), unused_beside_tokens(row))
        if (conversation := self._conversation(row)) is not None:
            return ChatRow(conversation, self._ground_truth(row), self._unused_columns(row, MISSED_IN_CONVERSATIONS))
        if (text := self._whole_text(row)) is not None:
            return PlainRow(text, "", self._ground_truth(row))
        prompt, ground_truth = self._prompt(row), self._ground_truth(row)
        if self.as_chat:
            return self._chat_row(row, prompt, None, ground_truth)
        return PlainRow(prompt, "", ground_truth, self._unused_columns(row))

    def _has_tokens(self, row: Row) -> bool:
        return row.get(IDS) is not None and not self._names_columns

    def _whole_text(self, row: Row) -> str | None:
        """The text of a row that is learnt as a whole; None if the row has a prompt or an output."""
        if self.text_field is not None:
            return self._text(row, self.text_field, "text_field")
        if self._names_columns or row.get("text") is None or any(row.get(column) is not None for column in TEXTS):
            return None
        if self.as_chat:
            raise SettingsError("`as_chat` writes a prompt and an output, but the row has `text` alone. Leave one out.")
        return self._text(row, "text", "text_field")

    @property
    def _names_columns(self) -> bool:
        """Whether an argument says where the text of a row is."""
        given = (self.prompt_field, self.output_field) != (RowFormat.prompt_field, RowFormat.output_field)
        return given or self.prompt_template is not None or self.text_field is not None

    def _transformed(self, row: AnyRow) -> Row:
        if isinstance(row, UnreadableRow):
            raise SettingsError(row.problem)
        if self.row_filter is not None:
            with _named("row_filter"):
                is_used = bool(self.row_filter(dict(row)))
            if not is_used:
                raise FilteredRowError
        if self.row_transform is not None:
            with _named("row_transform"):
                row = self.row_transform(dict(row))
            if not isinstance(row, Mapping):
                raise SettingsError(f"`row_transform` returned {shorten(row)}, expected a dictionary.")
        return row

    def _conversation(self, row: Row) -> Conversation | None:
        if self.prompt_template is not None or self.text_field is not None:
            return None
        names_output = self.output_field != RowFormat.output_field and row.get(self.output_field) is not None
        if self.prompt_field == RowFormat.prompt_field and not names_output:
            found = [column for column in CONVERSATIONS if row.get(column) is not None]
            said = [column for column in found if row[column]]
            if said and any(row[column] != row[said[0]] for column in said):
                raise SettingsError(f"the row has both `{said[0]}` and `{said[1]}`. Remove one.")
            if found:
                return read_conversation(row, (said or found)[:1], self.chat_template_kwargs)
        columns = [self.prompt_field, self._output_column(row)]
        first = [value[0] for value in map(row.get, columns) if isinstance(value, list) and value]
        if not any(isinstance(message, Mapping) for message in first):
            return None
        return read_conversation(row, columns, self.chat_template_kwargs)

    def _output_column(self, row: Row) -> str:
        """The column of the output: of the two defaults, the one that the row has."""
        is_completion = row.get(self.output_field) is None and row.get("completion") is not None
        return "completion" if is_completion and self.output_field == RowFormat.output_field else self.output_field

    def _chat_row(self, row: Row, prompt: str, output: str | None, ground_truth: str | None) -> ChatRow:
        """A row without messages, whose prompt and output become turns."""
        row_of_texts = {**row, "prompt": prompt, "output": output}
        conversation = read_conversation(row_of_texts, ["prompt", "output"], self.chat_template_kwargs)
        return ChatRow(conversation, ground_truth, self._unused_columns(row))

    def _refuse_preferences(self, row: Row) -> None:
        has_preferences = row.get("chosen") is not None and row.get("rejected") is not None
        outputs = [row.get(column) for column in (*CONVERSATIONS, self.output_field, "completion")]
        if has_preferences and all(output is None or is_asked(output) for output in outputs):
            raise SettingsError(
                "the row has `chosen` and `rejected`, a preference between two outputs, but only one output can be "
                "learnt. To learn the chosen one, set `row_transform` to `lightning_sft.chosen_row`."
            )

    def _unused_columns(self, row: Row, easily_missed: Collection[str] = tuple(EASILY_MISSED)) -> tuple[str, ...]:
        if self.row_transform is not None:  # which has seen the others
            easily_missed = PICTURES
        template = self.prompt_template
        of_prompt = (self.prompt_field,) if template is None else template_columns(template)
        used = {*of_prompt, self.output_field, self.ground_truth_field, *(WRITTEN_BY_AS_CHAT if self.as_chat else ())}
        return tuple(column for column in easily_missed if is_missed(row, column) and column not in used)

    def _prompt(self, row: Row) -> str:
        if self.prompt_template is None:
            return self._text(row, self.prompt_field, "prompt_field")
        columns = template_columns(self.prompt_template)
        return self.prompt_template.format(**{name: self._text(row, name, "prompt_template") for name in columns})

    def _ground_truth(self, row: Row) -> str | None:
        if self.ground_truth_field == RowFormat.ground_truth_field and row.get(self.ground_truth_field) is None:
            return None
        return self._text(row, self.ground_truth_field, "ground_truth_field")

    def _text(self, row: Row, field: str, argument: str) -> str:
        value = row.get(field)
        if value is None:
            columns = shorten(sorted(map(str, row)), 200)
            hint = way_out(row, self._missing(row)) if argument in ("prompt_field", "output_field") else ""
            raise SettingsError(f"no value for `{field}` (`{argument}`). The row has {columns}.{hint}")
        if not isinstance(value, str):
            raise SettingsError(
                f"`{field}` (`{argument}`) is {shorten(value)} of type {type(value).__name__}, expected a string."
            )
        check_is_text(f"`{field}` (`{argument}`)", value)
        return value

    def _missing(self, row: Row) -> dict[str, str]:
        """The default columns that a row lacks, each with the argument that names it."""
        names = {"output": ("output_field", self._output_column(row))}
        if self.prompt_template is None:
            names = {"prompt": ("prompt_field", self.prompt_field), **names}
        return {
            column: argument
            for column, (argument, name) in names.items()
            if row.get(name) is None and getattr(self, argument) == column
        }
