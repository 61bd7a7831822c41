"""The READMEs' pictures: small, and drawn by a command that still works."""

import sys

import pytest
from PIL import Image
from support.paths import ROOT
from support.refusals import write

from lightning_sft.examples import word_problems

sys.path.insert(0, str(ROOT / "notebooks"))

import pictures


def test_pictures_are_small_files():
    found = [path for ending in ("png", "svg") for path in (ROOT / "notebooks").glob(f"*.{ending}")]
    assert {"comparison.png", "curves.png", "generations.png", "preview.svg"} <= {path.name for path in found}
    assert all(path.stat().st_size < 100_000 for path in found)


def test_curves_are_drawn_from_what_a_run_has_logged(tmp_path):
    names = [name for lines in pictures.PANELS.values() for name in lines]
    rows = [",".join(map(str, [step, *([1 / step] * len(names))])) for step in (1, 2, 3)]
    write(tmp_path / "metrics.csv", "\n".join([",".join(["step", *names]), *rows]) + "\n")
    pictures.draw_curves(tmp_path, tmp_path / "curves.png")
    picture = Image.open(tmp_path / "curves.png")
    assert (picture.size, picture.mode) == ((1320, 297), "P")
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line of each


def test_the_preview_shows_what_is_learnt_in_colour_and_loads_nothing(tmp_path, monkeypatch):
    few = {"train": word_problems(num_rows=20), "validation": word_problems(num_rows=4, split="validation")}
    monkeypatch.setattr(pictures, "word_problems", lambda num_rows, split="train": few[split])
    pictures.draw_preview(tmp_path / "preview.svg")
    picture = (tmp_path / "preview.svg").read_text(encoding="utf-8")
    assert all(words in picture for words in ("#8fd694", "#6fbf78", "&lt;answer&gt;", "lightning-sft&#160;preview"))
    assert "url(" not in picture.replace("url(#", "")


def test_without_a_browser_pages_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "BROWSERS", ("no-such-browser",))
    with pytest.raises(SystemExit, match="None of no-such-browser is on the path"):
        pictures.draw_page(tmp_path / "page.html", "", (10, 10), tmp_path / "page.png")
