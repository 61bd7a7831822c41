"""Whether a file can be the checkpoint of a run, found out without reading its weights or running what it holds."""

import os
import pickle
import re
import zipfile

import torch

from lightning_sft.messages import one_line


def check_checkpoint(path: str, resume: bool) -> None:
    """Refuse what Lightning could not load. Tensors are mapped, not read, so the size does not matter.

    Args:
        path: The file.
        resume: Whether a training is to go on from it, which takes more than weights.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or not whole, or holds what could run code.
    """
    came = f"`ckpt_path` is {path!r}"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{came}, but there is no such file. Runs keep theirs in `<log_dir>/checkpoints`.")
    if os.path.isfile(os.path.join(path, ".metadata")):
        raise ValueError(
            f"{came}, a sharded checkpoint. Torch unpickles those, so loading it could run code from it. If you trust "
            "whoever made it, set `weights_only` to false."
        )
    if os.path.isdir(path):
        raise ValueError(f"{came}, a folder without a checkpoint. Give the file itself, such as checkpoints/last.ckpt.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{came}, which is no whole checkpoint ({os.path.getsize(path)} bytes): it is cut short, or something "
            "else. Take another one, such as the best."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{came}, which holds {_what(error)}, not tensors and plain values alone. Loading it could run code, so it "
            "is not loaded. If you trust whoever made it, set `weights_only` to false."
        ) from None
    except Exception as error:
        raise ValueError(f"{came}, which cannot be read: {one_line(error)} Take another one.") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        raise ValueError(
            f"{came}, which is no checkpoint of a run: it has no `state_dict` beside a Lightning version. "
            "To start from weights, set `model` to a folder that `save_pretrained` made."
        )
    if resume and not {"loops", "optimizer_states"} <= checkpoint.keys():
        raise ValueError(f"{came}, which has weights alone. To continue a training, take one with the optimizer.")


def _what(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"`{found[1]}`" if found else "objects"
