"""The reference is what `help` shows: every public name explains itself and each of its parameters."""

import inspect
import re
from pathlib import Path

import pytest

import lightning_sft
import lightning_sft.examples

PUBLIC = [(room, name) for room in (lightning_sft, lightning_sft.examples) for name in room.__all__]


def own_callables():
    """Everything exported, and what its classes add to their bases: Lightning explains its own hooks."""
    for room, name in PUBLIC:
        exported = getattr(room, name)
        if not inspect.isclass(exported):
            yield name, exported
            continue
        if "__init__" in vars(exported):
            yield name, exported
        for member, value in vars(exported).items():
            inherited = any(hasattr(base, member) for base in exported.__mro__[1:])
            if inspect.isfunction(value) and not member.startswith("_") and not inherited:
                yield f"{name}.{member}", value


@pytest.mark.parametrize(
    ("name", "value"), list(own_callables()), ids=lambda value: value if type(value) is str else ""
)
def test_every_parameter_is_explained_and_no_other(name, value):
    parameters = [parameter for parameter in inspect.signature(value).parameters if parameter != "self"]
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", inspect.getdoc(value) or "", re.MULTILINE)
    explained = re.findall(r"^ {4}\*{0,2}(\w+): ", section[1], re.MULTILINE) if section else []
    assert explained == parameters


@pytest.mark.parametrize(("room", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_every_public_name_and_member_has_a_docstring(room, name):
    exported = getattr(room, name)
    assert exported.__doc__
    for member, value in vars(exported).items() if inspect.isclass(exported) else ():
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert value.__doc__, member


def test_what_a_user_can_mend_is_called_by_its_own_name():
    """`SettingsError` is a `ValueError`, but a docstring that says so has readers catch more than they mean to."""
    for path in Path(lightning_sft.__file__).parent.rglob("*.py"):
        text = path.read_text()
        said = set(re.findall(r"^ +((?:Value|Type|FileNotFound|Import)Error): ", text, re.MULTILINE))
        assert said <= set(re.findall(r"raise (\w+)", text)), path
