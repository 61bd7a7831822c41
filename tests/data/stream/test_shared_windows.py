"""Two processes that train together: each encodes its share of the rows, and the steps are those of one alone."""

import json
import os

import pytest
import torch.distributed as dist
from support.models import character_tokenizer
from support.processes import Processes
from support.runs import ROWS

from lightning_sft.data.encoding import Encoding, RowEncoder
from lightning_sft.data.rows.row_format import RowFormat
from lightning_sft.data.steps.plan import StepRule
from lightning_sft.data.steps.step_loader import LoaderOptions
from lightning_sft.data.streamed_rows import StreamedRows
from lightning_sft.errors import SettingsError
from lightning_sft.loops.run_length import Epoch

BAD = {"prompt": "bad", "output": 3}
LONG = {"prompt": "long", "output": "x" * 100}
LENIENT = Encoding(max_length=40, too_long="drop", bad_rows="drop")


class CountingEncoder(RowEncoder):
    """Counts rows, and fails at one."""

    num_rows, fails_at = 0, None

    def encode(self, rows, only_source=None):
        rows = list(rows)
        self.num_rows += len(rows)
        if any(location.startswith(f"line {self.fails_at} ") for location, _ in rows):
            raise KeyError("a bug")
        return super().encode(rows, only_source)


class Stream:
    """Rows of a file, and the steps that the loader of a process makes of them."""

    def __init__(self, path, encoding=LENIENT, rows_per_block=9):
        self.encoder = CountingEncoder(RowFormat(), character_tokenizer(), encoding)
        rule = StepRule(8, max_tokens_per_microbatch=45)
        self.rows = StreamedRows(path, self.encoder, rule, rows_per_block)
        self.encoder.num_rows = 0

    def loader(self, numbers, num_workers=0, epoch=None):
        options = LoaderOptions(character_tokenizer(), "packed", int(os.environ["RANK"]), 2, num_workers)
        return iter(self.rows.loader(epoch, numbers, options))

    def take(self, numbers, **options):
        """For each step all that this process has of it, and what a checkpoint would keep."""
        return [
            [
                [(part.input_ids.tolist(), part.response_mask.tolist(), part.locations) for part in step.microbatches],
                step.totals,
                self.rows.state(number + 1),
            ]
            for number, step in zip(numbers, self.loader(numbers, **options), strict=True)
        ]


def share(path, strict_path):
    """Every process: without the other it encodes all rows, and with it half of them, with the same result."""
    whole, limited = Stream(path), Epoch(3, is_limited=True)
    steps, short_passes = whole.take(range(12)), Stream(path).take(range(8), epoch=limited)
    assert len(steps[0][0]) > 1
    dist.init_process_group("gloo")
    assert Stream(path).take(range(12), num_workers=1) == steps
    assert Stream(path).take(range(8), num_workers=1, epoch=limited) == short_passes
    assert (halved := Stream(path)).take(range(12)) == steps
    assert halved.encoder.num_rows == pytest.approx(whole.encoder.num_rows / 2, abs=32)
    resumed = Stream(path)
    resumed.rows.resume(json.loads(json.dumps(steps[4][2])))
    assert resumed.take(range(5, 12)) == steps[5:]

    # Both processes end where one of them finds a bad row, after the rows before it, or fails.
    bad_row = (SettingsError, r"^line 1015 of \S+: `output` ")
    fails = (KeyError, "a bug"), (RuntimeError, "^Another process cannot encode rows: KeyError: 'a bug'")
    for fails_at, num_workers, problems in ((None, 1, (bad_row, bad_row)), (1013, 0, fails)):
        stream, steps = Stream(strict_path, Encoding(bad_rows="error"), rows_per_block=1), []
        stream.encoder.fails_at = fails_at if dist.get_rank() == 0 else None
        error, message = problems[dist.get_rank()]
        with pytest.raises(error, match=message):
            steps.extend(stream.loader(range(200), num_workers))
        assert fails_at or len(steps) == 126
    dist.destroy_process_group()


def test_two_processes_have_the_steps_of_one_and_each_encodes_half_of_the_rows(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    rows = [
        row for number, row in enumerate(ROWS) for row in [row, *([LONG] * (number % 3)), *([BAD] * (number == 20))]
    ]
    strict = [*(ROWS * 24)[:1014], BAD, *ROWS]
    processes = Processes(share, write("rows.jsonl", rows), write("strict.jsonl", strict), world_size=2)
    assert processes.wait() == [0, 0]
