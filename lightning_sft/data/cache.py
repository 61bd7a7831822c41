"""Where rows and their token ids are cached, and the code that a cached result depends on."""

import errno
from functools import cache
from hashlib import blake2b
from pathlib import Path

import datasets

from lightning_sft.errors import SettingsError, one_line


def cache_folder() -> Path:
    """The folder for this package inside the cache of `datasets`; it is made if it is not there yet."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "lightning_sft")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cache_error(error) from error
    return folder


def cache_error(error: BaseException) -> SettingsError:
    """What a user is told if the cache cannot be used."""
    return SettingsError(
        f"The cache of `datasets`, {datasets.config.HF_DATASETS_CACHE}, cannot be used: {one_line(error)}. Set the "
        "environment variable `HF_DATASETS_CACHE` to a folder that can be written and has room."
    )


def is_of_cache(error: BaseException) -> bool:
    """Whether an error in reading rows is one of the cache that they are put into, not of the file that they are in."""
    if not isinstance(error, OSError):
        return False
    return error.errno == errno.ENOSPC or str(error.filename).startswith(str(datasets.config.HF_DATASETS_CACHE))


@cache
def code_hash() -> str:
    """A hash of all files in and below this folder, so that the cache never serves what older code has made.

    Most of them read, write or tokenise rows. To list those alone would save some work after a change of the others,
    and would give wrong results as soon as one were forgotten.
    """
    hasher = blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()
