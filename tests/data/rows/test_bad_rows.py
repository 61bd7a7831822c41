"""Rows that are left out: counted by what is wrong with them, whatever they show of themselves."""

import pytest

from lightning_sft.data.rows.bad_rows import BadRow, BadRowCounts

ALIKE = [
    "no value for `output` (`output_field`). The row has {}.",
    "`output` (`output_field`) is {} of type list, expected a string.",
    "`messages`, turn {} has the role 'wizard', expected one of system, user, assistant.",
    "not valid JSON (Expecting value at column {}): 'prompt: a'",
    "`row_transform` failed: KeyError: {}",
    "the chat template refuses the first {} messages: TemplateError: roles must alternate",
]
VALUES = [["a"], [1, "b"], ["it's"], [3], ["c"]]


def test_rows_are_counted_by_what_is_wrong_and_the_first_of_each_kind_is_shown():
    shown = [VALUES, VALUES, [2, 31], [1, 90], ["'a'", '"b"'], [3, 15]]
    rows = [
        BadRow(f"line {kind}{number}", problem.format(value))
        for kind, (problem, values) in enumerate(zip(ALIKE, shown, strict=True))
        for number, value in enumerate(values)
    ]
    counts = BadRowCounts(rows)
    assert list(counts.counted.values()) == [5, 5, 2, 2, 2, 2]
    assert counts.total == len(rows)
    firsts = {first.kind: first for first in counts.counted}
    assert firsts["not valid JSON (Expecting value at column #): "].problem.startswith("not valid JSON")
    words = counts.in_words()
    assert words[0] == "5 rows such as line 00: no value for `output` (`output_field`). The row has ['a']."
    assert words[5:] == ["2 more rows for other reasons."]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("no value for `output` (`output_field`).", "no value for `prompt` (`prompt_field`)."),
        ("`row_transform` failed: KeyError: 'a'", "`row_transform` failed: ValueError: 'a'"),
        ("`messages` has no messages; expected at least one.", "`messages`, turn 1 has the role None, expected one"),
    ],
)
def test_what_is_wrong_otherwise_is_counted_apart(one, other):
    counts = BadRowCounts([BadRow("line 1", one), BadRow("line 2", other)])
    assert counts.in_words() == [f"1 row, line 1: {one}", f"1 row, line 2: {other}"]
