"""Mistakes in tables: how each is made, and the one line that whoever makes it is told."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.errors import SettingsError
from support.fits import make_trainer
from support.models import character_tokenizer

ROWS = [{"prompt": f"q{i}", "output": "abc"} for i in range(4)]
Provoke = Callable[[Path], object]


@dataclass(frozen=True)
class Refusal:
    """A mistake and what is said about it.

    Attributes:
        provoke: Makes the mistake; it is given a folder for files.
        message: The whole message. `{tmp}` stands for the folder, `...` for the words of other libraries, which change
            with their versions.
        kind: Of the exception.
    """

    provoke: Provoke
    message: str
    kind: type[SettingsError] = SettingsError

    def check(self, folder: Path) -> None:
        """Make the mistake, and compare what is said."""
        with pytest.raises(self.kind) as caught:
            self.provoke(folder)
        assert_says(str(caught.value), self.message, folder)


def each(table: dict[str, Refusal]) -> pytest.MarkDecorator:
    """A test for each line of a table, as its argument `refusal`."""
    return pytest.mark.parametrize("refusal", table.values(), ids=table)


def assert_says(message: str, expected: str, folder: Path) -> None:
    """Compare a message, which is one line, with what a table says."""
    expected = expected.replace("{tmp}", str(folder))
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    assert re.fullmatch(pattern, message), f"\n{message}\nis not\n{expected}"  # `.` matches no line break


def assert_clear(error: Exception, *places: str) -> None:
    """What a user is told: one line that names where the trouble is."""
    assert isinstance(error, SettingsError), error
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1, message
    assert any(place in message for place in places), message


def in_folder(value: object, folder: Path) -> object:
    """A value where `{tmp}` is the folder."""
    return value.replace("{tmp}", str(folder)) if isinstance(value, str) else value


def write(path: Path, content: str | bytes) -> Path:
    """A file, with the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def data(**options: object) -> Provoke:
    """A data module, set up."""

    def provoke(folder: Path) -> None:
        how = {"tokenizer": character_tokenizer(), "train_data": ROWS} | options
        SFTDataModule(**{name: in_folder(value, folder) for name, value in how.items()}).setup("fit")

    return provoke


def file(name: str, content: str | bytes, **options: object) -> Provoke:
    """A data module over one file."""
    return lambda folder: data(train_data=str(write(folder / name, content)), **options)(folder)


def row(row: dict, **options: object) -> Provoke:
    """A data module over a good row and this one."""
    return data(train_data=[{"prompt": "a", "output": "b"}, row], **options)


def module(model: object, **options: object) -> Provoke:
    """A module, its model loaded."""
    return lambda folder: SFTModule(in_folder(model, folder), **options).configure_model()


def fit(
    model: object,
    *,
    of_data: dict | None = None,
    trainer: dict | None = None,
    ckpt_path: str | None = None,
    **options: object,
) -> Provoke:
    """One optimizer step; `options` are the module's."""

    def provoke(folder: Path) -> None:
        rows = SFTDataModule(character_tokenizer(), ROWS, **(of_data or {}))
        how = {"max_steps": 1} | (trainer or {})
        make_trainer(folder, **how).fit(SFTModule(model, **options), rows, ckpt_path=ckpt_path)

    return provoke
