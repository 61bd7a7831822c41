"""Prompt templates: text with names of columns in it."""

import string
from functools import cache

from lightning_sft.data.tokens.texts import read_template_file
from lightning_sft.errors import SettingsError, shorten


@cache  # asked for with each row
def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names."""
    return tuple(field for _, field, _, _ in string.Formatter().parse(template) if field is not None)


def read_prompt_template(template: str) -> str:
    """A template, or that of a file whose path is given."""
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
