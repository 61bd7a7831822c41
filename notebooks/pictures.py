"""The pictures of the READMEs, drawn from a run of the quickstart: its data, its curves, its pages.

python notebooks/pictures.py                                    # runs the quickstart first, a minute on two CPU cores
python notebooks/pictures.py --run runs/quickstart/version_0    # of a run that is there

Pages are drawn by Chromium without a screen, the preview by `rich`, curves by matplotlib.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from lightning_sft import SFTDataModule, compare_runs, read_run
from lightning_sft.examples import word_problems, word_tokenizer

FOLDER = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--hide-scrollbars", "--virtual-time-budget=5000"),  # milliseconds to load in
)
PANELS = {  # of the figure of curves: a title, and what each line is called
    "loss, nats per token": {"train/loss": "training", "val/loss": "validation"},
    "rewards of 256 answers": {"val/answer_reward": "answer", "val/format_reward": "format"},
    "entropy of responses, nats per token": {"val/response_entropy": ""},
    "gradient norm": {"train/grad_norm": ""},
}
STEP = 200  # of the generations that are shown: some answers are still wrong


def run_quickstart(folder: Path) -> Path:
    """Train as the README says; returns the run's folder."""
    words = ["fit", "--config", "quickstart", "--trainer.default_root_dir", str(folder)]
    subprocess.run([sys.executable, "-m", "lightning_sft", *words], check=True)
    return next(folder.glob("runs/quickstart/version_*"))


def draw_page(page: Path, state: str, size: tuple[int, int], output: Path) -> None:
    """What a browser's window of `size` pixels shows of a page, in few colours, which makes it a small file."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is on the path.")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "shot.png")
        options = [f"--user-data-dir={folder}/profile", f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}"]
        address = f"{page.resolve(strict=True).as_uri()}#{state}"
        subprocess.run([browser, *FLAGS, *options, address], check=True, capture_output=True, timeout=60)
        with_few_colours(Image.open(shot)).save(output, optimize=True)


def with_few_colours(image: Image.Image) -> Image.Image:
    """The same to the eye, at half of the bytes."""
    return image.convert("RGB").quantize(256, dither=Image.Dither.NONE)


def draw_comparison(run: Path, output: Path) -> None:
    """The model half-way and at the end, side by side: what it has learnt in between."""
    with tempfile.TemporaryDirectory() as folder:
        halfway = run / "generations" / f"step_{STEP}.jsonl"
        page = compare_runs([halfway, run], Path(folder, "comparison.html"), [f"step {STEP}", "the end"]).page
        draw_page(page, "filter=gained_1", (1180, 1120), output)


def draw_curves(run: Path, output: Path) -> None:
    """What the run has logged to TensorBoard."""
    metrics = read_run(run).metrics
    figure = Figure(figsize=(12, 2.7), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name, label in lines.items():
            curve = metrics[name].dropna()
            axis.plot(curve.index, curve, marker="." if len(curve) < 20 else "", label=label)
        axis.set(title=title, xlabel="optimizer steps")
        axis.title.set_fontsize(10)
        axis.set_yscale("log" if "loss" in title else "linear")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    with_few_colours(Image.open(drawn)).save(output, optimize=True)


def draw_preview(output: Path) -> None:
    """What `lightning-sft preview --config quickstart --num_rows 2` prints."""
    data = SFTDataModule(
        word_tokenizer(), word_problems(num_rows=20000), word_problems(num_rows=256, split="validation"), batch_size=64
    )
    console = Console(record=True, width=104, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(data.preview(2))
    picture = console.export_svg(
        title="lightning-sft preview --config quickstart --num_rows 2",
        theme=DEFAULT_TERMINAL_THEME,
        unique_id="preview",  # or else each drawing would have names of its own
    )
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # a picture loads nothing
    output.write_text(picture, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run of the quickstart; default: make one")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the pictures; default: notebooks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or run_quickstart(Path(folder))
        draw_page(run / "generations" / "index.html", f"step={STEP}", (1180, 750), options.output / "generations.png")
        draw_comparison(run, options.output / "comparison.png")
        draw_curves(run, options.output / "curves.png")
    draw_preview(options.output / "preview.svg")


if __name__ == "__main__":
    main()
