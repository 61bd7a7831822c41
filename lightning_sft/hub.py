"""Names on a hub of Hugging Face, perhaps of one revision, such as `user/model@v1.0`."""

import os
import re
from pathlib import Path
from typing import Literal

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

_WITH_REVISION = re.compile(r"(\w[\w.-]*(?:/[\w.-]+)?)@(.+)")


def split_revision(name: str) -> tuple[str, str | None]:
    """A name without its revision, and the revision: a commit, branch or tag. A path, or a name alone, has none."""
    found = _WITH_REVISION.fullmatch(name)
    if found is None or os.path.exists(name) or os.path.exists(found[1]):
        return name, None
    return found[1], found[2]


def is_commit(revision: str | None) -> bool:
    """Whether a revision is the full hash of a commit, which always means the same."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def commit_of(
    name: str, revision: str | None, kind: Literal["model", "dataset"], cache: str | Path | None = None
) -> str | None:
    """The commit that a revision was when something of it was last downloaded to this machine; None if nobody knows.

    Args:
        name: Of a repository on the hub, without revision.
        revision: A commit, branch or tag. None: the main branch.
        kind: Of the repository.
        cache: The folder of downloads. Default: as the environment says.
    """
    if os.path.exists(name):
        return None
    if is_commit(revision):
        return revision
    folder = Path(cache or constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))
    try:
        return (folder / "refs" / (revision or constants.DEFAULT_REVISION)).read_text(encoding="utf-8").strip()
    except OSError:
        return None
