"""What processes inherit that are forked to read and to tokenise rows."""

import gc
import json
import os
import weakref

import pytest
from support.models import character_tokenizer

from lightning_sft import SFTDataModule

ROWS = [{"prompt": f"q{i}", "output": "abc"} for i in range(40)]


class Cycle:
    """Only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"num_workers": 1, "streaming": True}, {"num_proc": 2}])
def test_processes_inherit_no_garbage(options, tmp_path):
    """A tensor of a CUDA device that is freed in a forked process aborts it."""
    freed_in = []
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    data = SFTDataModule(character_tokenizer(), str(rows), batch_size=4, **options)
    gc.disable()
    try:
        weakref.finalize(Cycle(), lambda: freed_in.append(os.getpid()))
        data.setup("fit")
        if "num_workers" in options:
            next(iter(data.train_dataloader()))
        assert freed_in == [os.getpid()]
    finally:
        gc.enable()
