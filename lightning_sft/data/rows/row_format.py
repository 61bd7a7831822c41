"""The format of rows: which columns are the prompt, the output and the ground truth, or a conversation."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_sft.checks import check_callable, check_choice, check_type
from lightning_sft.data.chat.chat_encoding import TrainOnTurns
from lightning_sft.data.chat.conversation import Conversation, check_variables, read_conversation
from lightning_sft.data.rows.bad_rows import FilteredRowError
from lightning_sft.data.rows.readers import UnreadableRow
from lightning_sft.data.tokens.texts import check_is_text, read_template_file
from lightning_sft.errors import SettingsError, one_line, shorten

Row: TypeAlias = Mapping[str, Any]
AnyRow: TypeAlias = Row | UnreadableRow

_CONVERSATIONS = ("messages", "conversations", "conversation")  # columns that hold one
_ALPACA = "`row_transform: lightning_sft.alpaca_row` makes messages of `instruction`, `input`, `output` and `history`"
_EASILY_MISSED = {  # columns beside a prompt that people mean to be used, and what would use them
    "system": "`as_chat: true` writes `system`, prompt and output with the chat template",
    "history": _ALPACA,
    "input": _ALPACA,
}


@dataclass(frozen=True)
class PlainPrompt:
    """What a row without messages says to a model.

    Attributes:
        prompt: The text that the model goes on from.
        ground_truth: The reference answer; None if the row has none.
        unused_columns: Columns of the row that people mean to be used, and that are not.
    """

    prompt: str
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainRow:
    """What a row without messages says.

    Attributes:
        prompt: The text before the response.
        output: The response, which is to be learnt.
        ground_truth: The reference answer; the output if the row has no other.
        unused_columns: Columns of the row that people mean to be used, and that are not.
    """

    prompt: str
    output: str
    ground_truth: str
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRow:
    """What a row says that its chat template is to write.

    Attributes:
        conversation: The messages.
        ground_truth: The reference answer; None if the row has none.
        unused_columns: Of a row without messages: columns that people mean to be used, and that are not.
    """

    conversation: Conversation
    ground_truth: str | None
    unused_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowFormat:
    """Which columns of a row are its prompt, output and ground truth, and how the prompt is written.

    Args:
        prompt_field: Column with the text before; unused with a template.
        output_field: Column with the text to learn.
        ground_truth_field: Column with the reference answer; a row without the default column uses its output.
        prompt_template: Text with `{column}` in it, or the path of a file that holds such a text (its last line
            break is dropped). Literal braces are doubled.
        row_transform: Called with each row first; returns the row to use instead.
        train_on_turns: Of a conversation: whether all of the assistant's turns are learnt or the last one.
        chat_template_kwargs: More that the chat template can use; a row's own column of this name comes first.
        as_chat: Whether the prompt and output of a row without messages are a user's and an assistant's turn, after a
            column `system`.
        row_filter: Called with each row as it is read; whether it is used.

    A row is a conversation if it has the column `messages`, `conversations` or `conversation` while neither
    `prompt_field` nor `prompt_template` is given, or if its prompt or output is a list of messages.

    Raises:
        MissingFileError: If the template has no `{column}` and is no file either.
        SettingsTypeError: If an argument is of another type.
        SettingsError: If the template's braces are not of this form, or its file is not UTF-8 text.
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

    def __post_init__(self) -> None:
        for name in ("prompt_field", "output_field", "ground_truth_field"):
            check_type(name, getattr(self, name), str, "the name of a column")
        check_callable("row_transform", self.row_transform, "a function", optional=True)
        check_callable("row_filter", self.row_filter, "a function", optional=True)
        if self.prompt_template is not None:
            check_type("prompt_template", self.prompt_template, str, "a text or the path of a file, as a string")
            object.__setattr__(self, "prompt_template", _read_prompt_template(self.prompt_template))
        check_choice("train_on_turns", self.train_on_turns, TrainOnTurns)
        if self.chat_template_kwargs is not None:
            check_type("chat_template_kwargs", self.chat_template_kwargs, Mapping, "values by their names")
            check_variables(self.chat_template_kwargs)
        check_type("as_chat", self.as_chat, bool, "true or false")

    def render(self, row: AnyRow) -> PlainRow | ChatRow:
        """What a row says that is to be learnt.

        Raises:
            SettingsError: If it cannot be read, a column is missing or no string, or `row_transform` fails.
        """
        row = self._transformed(row)
        self._refuse_preferences(row)
        conversation, ground_truth = self._conversation(row), self._ground_truth(row)
        if conversation is not None:
            return ChatRow(conversation, ground_truth)
        prompt, output = self._prompt(row), _text(row, self.output_field, "output_field")
        if self.as_chat:
            return self._chat_row(row, prompt, output, ground_truth)
        return PlainRow(prompt, output, output if ground_truth is None else ground_truth, self._unused_columns(row))

    def render_prompt(self, row: AnyRow) -> PlainPrompt | ChatRow:
        """What a row says that a model is to go on from; an output is not needed.

        Raises:
            SettingsError: As `render`.
        """
        row = self._transformed(row)
        conversation, ground_truth = self._conversation(row), self._ground_truth(row)
        if conversation is not None:
            return ChatRow(conversation, ground_truth)
        prompt = self._prompt(row)
        if self.as_chat:
            return self._chat_row(row, prompt, None, ground_truth)
        return PlainPrompt(prompt, ground_truth, self._unused_columns(row))

    def _is_used(self, row: Row) -> bool:
        try:
            return self.row_filter is None or bool(self.row_filter(dict(row)))
        except Exception as error:
            raise SettingsError(f"`row_filter` failed: {type(error).__name__}: {one_line(error)}") from error

    def _transformed(self, row: AnyRow) -> Row:
        if isinstance(row, UnreadableRow):
            raise SettingsError(row.problem)
        if not self._is_used(row):
            raise FilteredRowError
        if self.row_transform is None:
            return row
        try:
            row = self.row_transform(dict(row))
        except SettingsError:  # of a ready one, in our own words
            raise
        except Exception as error:
            raise SettingsError(f"`row_transform` failed: {type(error).__name__}: {one_line(error)}") from error
        if not isinstance(row, Mapping):
            raise SettingsError(f"`row_transform` returned {shorten(row)}, expected a dictionary.")
        return row

    def _conversation(self, row: Row) -> Conversation | None:
        if self.prompt_template is not None:
            return None
        if self.prompt_field == RowFormat.prompt_field:
            found = [column for column in _CONVERSATIONS if row.get(column) is not None]
            said = [column for column in found if row[column]]
            if said and any(row[column] != row[said[0]] for column in said):
                raise SettingsError(f"the row has both `{said[0]}` and `{said[1]}`. Remove one.")
            if found:
                return read_conversation(row, (said or found)[:1], self.chat_template_kwargs)
        columns = [self.prompt_field, self.output_field]
        if columns[1] == RowFormat.output_field and row.get(columns[1]) is None:
            columns[1] = "completion"
        first = [value[0] for value in map(row.get, columns) if isinstance(value, list) and value]
        if not any(isinstance(message, Mapping) for message in first):
            return None
        return read_conversation(row, columns, self.chat_template_kwargs)

    def _chat_row(self, row: Row, prompt: str, output: str | None, ground_truth: str | None) -> ChatRow:
        """A row without messages, whose prompt and output become turns."""
        columns = ["prompt", "output"]
        row_of_texts = {**row, "prompt": prompt, "output": output}
        conversation = read_conversation(row_of_texts, columns, self.chat_template_kwargs)
        return ChatRow(conversation, ground_truth, self._unused_columns(row))

    def _refuse_preferences(self, row: Row) -> None:
        has_preferences = row.get("chosen") is not None and row.get("rejected") is not None
        outputs = (*_CONVERSATIONS, self.output_field, "completion")
        if has_preferences and all(row.get(column) is None for column in outputs):
            raise SettingsError(
                "the row has `chosen` and `rejected`: two outputs, of which one is to be preferred. Here one output is "
                "learnt. To learn the chosen one alone, set `row_transform` to `lightning_sft.chosen_row`."
            )

    def _unused_columns(self, row: Row) -> tuple[str, ...]:
        if self.row_transform is not None:  # which has seen them
            return ()
        used = {*self._prompt_columns, self.output_field, self.ground_truth_field}
        used |= {"system"} if self.as_chat else set()
        return tuple(column for column in _EASILY_MISSED if row.get(column) and column not in used)

    @property
    def _prompt_columns(self) -> list[str]:
        if self.prompt_template is None:
            return [self.prompt_field]
        return [field for _, field, _, _ in string.Formatter().parse(self.prompt_template) if field is not None]

    def _prompt(self, row: Row) -> str:
        if self.prompt_template is None:
            return _text(row, self.prompt_field, "prompt_field")
        fields = self._prompt_columns
        return self.prompt_template.format(**{field: _text(row, field, "prompt_template") for field in fields})

    def _ground_truth(self, row: Row) -> str | None:
        if self.ground_truth_field == RowFormat.ground_truth_field and row.get(self.ground_truth_field) is None:
            return None
        return _text(row, self.ground_truth_field, "ground_truth_field")


def unused_in_words(columns: Sequence[str]) -> str:
    """What a user is told of columns that nothing uses."""
    ways = dict.fromkeys(_EASILY_MISSED[column] for column in columns)
    ways_out = "; ".join([*ways, "`prompt_template` can name any column"])
    return (
        f"nothing uses the column{'s' if columns[1:] else ''} {', '.join(f'`{name}`' for name in columns)}. {ways_out}."
    )


def _read_prompt_template(template: str) -> str:
    if "{" not in template:
        way_out = "Give a text such as 'Question: {question}', or the path of a file with such a text."
        template = read_template_file("prompt_template", template, "{column}", way_out).removesuffix("\n")
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise SettingsError(f"`prompt_template` has unbalanced braces ({error}). Write literal braces twice.") from None
    if not parts:
        raise SettingsError("`prompt_template` has no {column} in it, so all prompts would be the same.")
    for _, field, spec, conversion in parts:
        if not str(field).isidentifier() or spec or conversion:
            extras = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            found = shorten(f"{{{field}{extras}}}", 80).strip("'")  # a JSON example has line breaks
            raise SettingsError(
                f"`prompt_template` has {found}, but expects plain column names such as {{question}}. "
                "Write literal braces twice."
            )
    return template


def _text(row: Row, field: str, argument: str) -> str:
    value = row.get(field)
    if value is None:
        columns = shorten(sorted(map(str, row)), 200)
        raise SettingsError(f"no value for `{field}` (`{argument}`). The row has {columns}.")
    if not isinstance(value, str):
        raise SettingsError(
            f"`{field}` (`{argument}`) is {shorten(value)} of type {type(value).__name__}, expected a string."
        )
    check_is_text(f"`{field}` (`{argument}`)", value)
    return value
