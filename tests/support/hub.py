"""What the client of a hub has kept of the model `user/model`, for where the hub cannot be reached."""

from pathlib import Path
from typing import Any

import pytest

FIRST, SECOND = "1" * 40, "2" * 40


class CachedModel:
    """Commits of the model, and what branches and tags are."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        self._folder = cache / "models--user--model"
        (self._folder / "refs").mkdir(parents=True)

    def add(self, commit: str, *parts: Any) -> None:
        """Add a commit with a model, or a tokenizer too."""
        for part in parts:
            part.save_pretrained(self._folder / "snapshots" / commit)

    def move(self, branch: str, commit: str) -> None:
        """Let a branch or tag be a commit from now on."""
        (self._folder / "refs" / branch).write_text(commit)
