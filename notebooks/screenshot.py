"""A picture of the page that shows a run's generations, drawn by Chromium without a screen.

python notebooks/screenshot.py runs/quickstart/version_0 --step 200 --output notebooks/generations.png
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--hide-scrollbars", "--window-size=1180,750", "--virtual-time-budget=5000"),  # pixels; milliseconds to load in
)


def draw(run: Path, step: int, output: Path) -> None:
    """Save a PNG of what the page shows of one step."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is on the path.")
    page = (run / "generations" / "index.html").resolve(strict=True)
    with tempfile.TemporaryDirectory() as profile:
        options = [*FLAGS, f"--user-data-dir={profile}", f"--screenshot={output.resolve()}"]
        subprocess.run([browser, *options, f"{page.as_uri()}#step={step}"], check=True, capture_output=True, timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, required=True, help="optimizer step to show")
    parser.add_argument("--output", type=Path, required=True, help="a PNG")
    options = parser.parse_args()
    draw(options.run, options.step, options.output)


if __name__ == "__main__":
    main()
