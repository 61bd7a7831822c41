"""The file that `predict` writes: each response once, whatever interrupts it."""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from operator import xor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.errors import SettingsError, shorten
from lightning_sft.generation.records import GenerationRecord, check_path, write_records
from lightning_sft.generation.settings import GenerationSettings
from lightning_sft.model.sharding import gathered, is_sharded


@dataclass(frozen=True)
class EarlierPredictions:
    """What an earlier run has left in its file.

    Attributes:
        num_prompts: Prompts that are done: the first so many.
        records: Their records, if they were asked for.
    """

    num_prompts: int = 0
    records: list[GenerationRecord] = field(default_factory=list)


class PredictionFile:
    """Records of a series of prompts, in their order, appended as they come.

    Args:
        path: Of the file, one JSON object a line.
        run: What the responses depend on (`prediction_run`); stands in each line.
        num_samples: Responses to each prompt.
    """

    def __init__(self, path: Path, run: str, num_samples: int = 1) -> None:
        self.path, self._run, self._num_samples = path, run, num_samples

    def resume(self, keep_records: bool = False) -> EarlierPredictions:
        """Find out where an earlier run stopped; what it left unfinished at the end of the file is removed."""
        check_path("predict_path", self.path)
        num_lines = end = whole = 0
        records: list[GenerationRecord] = []
        if not self.path.exists():
            return EarlierPredictions()
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n") and self._is_beginning(line):
                    break
                record = self._parse(line, num_lines)
                if keep_records:
                    records.append(record)
                num_lines, end = num_lines + 1, end + len(line)
                if num_lines % self._num_samples == 0:
                    whole = end
        os.truncate(self.path, whole)
        done = num_lines // self._num_samples
        return EarlierPredictions(done, records[: done * self._num_samples])

    def _is_beginning(self, line: bytes) -> bool:
        """Whether a line that was broken off may be one of ours: nothing else is ever removed."""
        head = json.dumps({"run": self._run})[:-1].encode()
        return line[: len(head)] == head[: len(line)]

    def _parse(self, line: bytes, number: int) -> GenerationRecord:
        try:
            fields = json.loads(line)
            run = fields.pop("run")
            record = GenerationRecord(**fields)
        except (ValueError, TypeError, AttributeError, KeyError):
            found = f"line {number + 1} is {shorten(line.decode(errors='replace'))}"
        else:
            place = divmod(number, self._num_samples)
            if run == self._run and (record.index, record.sample) == place:
                return record
            found = "it holds those of other prompts, weights, rewards, sampling or generator"
            if run == self._run:
                found = f"line {number + 1} is of prompt {record.index}, expected {place[0]}"
        raise SettingsError(
            f"`predict_path` is {str(self.path)!r}, where the records of this run cannot be continued: {found}. "
            "Give another path, or remove the file."
        )

    def append(self, records: Sequence[GenerationRecord]) -> None:
        """Write records to the end of the file and to the disk."""
        write_records(self.path, records, "a", run=self._run)


def prediction_run(model: nn.Module, prompts: Iterable[Prompt], settings: GenerationSettings) -> str:
    """Twelve hexadecimal digits that change with whatever responses and rewards depend on.

    These are the model's weights, the prompts' texts and ground truths, the sampling, and the names and the source of
    the reward function and of a generator. All processes of a sharded model call this.
    """
    hasher = hashlib.blake2b(digest_size=6)
    functions = [_described(each) for each in (settings.reward_fn, settings.generator)]
    hasher.update(json.dumps([asdict(settings.sampling), functions, _hash_weights(model)]).encode())
    for prompt in prompts:
        hasher.update(json.dumps([prompt.text, prompt.ground_truth]).encode())
    return hasher.hexdigest()


def _described(function: object) -> list[str]:
    """What tells a function from another one, also of the same name, which a notebook may define again."""
    given = []
    while isinstance(function, partial):
        given.append(re.sub(" at 0x[0-9a-f]+", "", repr((function.args, function.keywords))))  # another each time
        function = function.func
    kind = function if inspect.isroutine(function) else type(function)
    with suppress(OSError, TypeError, SyntaxError):  # of what is written in C, or was typed into a shell
        given.append(inspect.getsource(kind))
    return [kind.__module__, kind.__qualname__, *given]


def _hash_weights(model: nn.Module) -> list[int]:
    """The bits of each weight's numbers, exclusive-ored: as good over the shares of several processes as over all."""
    local = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in model.parameters()]
    hashes = [int(torch.hash_tensor(weight.detach()).view(torch.int64)) if weight.numel() else 0 for weight in local]
    parts = gathered(hashes, dist.get_world_size() if is_sharded(model) else 1)
    return [reduce(xor, each) for each in zip(*parts, strict=True)]
