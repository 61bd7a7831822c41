"""`inspect_rows`: score every row under a model, and write a page to read them on, the hardest first."""

import heapq
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import lightning as L
import torch
from transformers import PreTrainedTokenizerBase

from lightning_sft.callbacks.generation_monitor import GenerationMonitor
from lightning_sft.checks import check_choice, check_integer, check_local
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.data.prepared_rows import PreparedRows
from lightning_sft.data.rows.sources import full_location
from lightning_sft.data.steps.optimizer_step import OptimizerStep
from lightning_sft.data.steps.step_loader import ExampleReader, LoaderOptions, PlanLoader
from lightning_sft.errors import SettingsError
from lightning_sft.generation.report.page import write_rows_page
from lightning_sft.inspection.scored_row import ScoredRow
from lightning_sft.model.head import ResponseScores
from lightning_sft.model.sharding import gathered
from lightning_sft.training.module import SFTModule
from lightning_sft.training.run_folder import writes_files

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_rows`.

    Attributes:
        page: File with the rows of highest loss, to read in a browser.
        rows: File with all rows, one `ScoredRow` as a JSON object per line.
        summary: `loss`, `perplexity`, `token_accuracy` and `token_entropy` over all learnt tokens, and `num_rows`.
    """

    page: Path
    rows: Path
    summary: dict[str, float]


def inspect_rows(
    trainer: L.Trainer,
    module: SFTModule,
    datamodule: SFTDataModule,
    split: Split = "train",
    num_rows: int = 1000,
    folder: str | Path | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> Inspection:
    """Compute the loss of every row of a split under the model, and write all rows and a page with the highest losses.

    Rows with the highest loss often have wrong labels. Results are the same on any number of devices. Memory does not
    grow with the number of rows, except for those on the page.

    Args:
        trainer: Its callbacks run as in `validate`, except for a `GenerationMonitor`: nothing is generated.
        module: The model.
        datamodule: The data.
        split: Which rows: `train`, `val` or `test`.
        num_rows: Number of rows on the page: those with the highest loss. The JSON lines have all rows.
        folder: Where to write both. Default: `inspection` in the folder of the checkpoint's run, or in the trainer's
            `default_root_dir`.
        ckpt_path: Checkpoint whose weights to score with. Default: the module's own.
        weights_only: Whether to refuse a checkpoint that could run code.

    Raises:
        SettingsError: If the rows are streamed, or there are none, or the trainer's `limit_val_batches` leaves none.
    """
    check_choice("split", split, Split)
    check_integer("num_rows", num_rows, at_least=1)
    check_local("folder", folder)
    if trainer.limit_val_batches == 0:
        raise SettingsError("`trainer.limit_val_batches` is 0, so that no row would be scored. Leave it out.")
    rows = InspectedRows(datamodule, split)
    where = Path(folder).expanduser() if folder else _run_folder(trainer, ckpt_path) / "inspection"
    inspector = RowInspector(rows, where, num_rows)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = list(callbacks)
    callbacks[:] = [*(each for each in found if not isinstance(each, GenerationMonitor)), inspector]
    try:
        trainer.validate(module, datamodule=rows, ckpt_path=ckpt_path, weights_only=weights_only, verbose=False)
    finally:
        callbacks[:] = found
    return inspector.inspection


def _run_folder(trainer: L.Trainer, ckpt_path: str | None) -> Path:
    if ckpt_path is not None and (checkpoints := Path(ckpt_path).parent).name == "checkpoints":
        return checkpoints.parent
    return Path(trainer.default_root_dir)  # also for a checkpoint that was moved elsewhere


class InspectedRows(L.LightningDataModule):
    """All rows of a split, each once, in the place of validation rows."""

    def __init__(self, data: SFTDataModule, split: Split) -> None:
        super().__init__()
        self.data, self.split = data, split

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the rows."""
        return self.data.tokenizer

    def prepare_data(self) -> None:
        """Tokenise on one process of each machine; the others then find the result in the cache."""
        self.data.rows_of(self.split)

    @property
    def rows(self) -> PreparedRows:
        """The rows, without weights that would have some of them left out."""
        rows = self.data.rows_of(self.split)
        if not isinstance(rows, PreparedRows):
            raise SettingsError("`streaming` is true, but `inspect` reads the rows in their order. Set it to false.")
        return rows.unweighted()

    def val_dataloader(self) -> PlanLoader:
        """The rows in the order of the data."""
        trainer = cast(L.Trainer, self.trainer)
        module = trainer.lightning_module
        options = LoaderOptions(
            self.tokenizer,
            self.data.layout_for(module),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            num_positions=getattr(module, "num_positions", None),
        )
        return self.rows.in_order(options)


class RowInspector(L.Callback):
    """Writes each row that is evaluated into a folder, and at the end a page of the hardest `num_rows`."""

    inspection: Inspection
    _file: IO[bytes] | None = None

    def __init__(self, data: InspectedRows, folder: Path, num_rows: int) -> None:
        self._data, self._folder, self._num_rows = data, folder, num_rows

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the file."""
        self._rows = rows = self._data.rows
        self._reader = ExampleReader(rows.rows)
        self._name = f"{self._data.split}_step_{cast(SFTModule, pl_module).num_steps_taken}"
        self._hardest: list[tuple[float, int, int]] = []  # loss, -index, place in the file
        self._num_seen, self._total_loss = 0, 0.0
        if writes_files(trainer):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = open(self._partial, "wb")  # noqa: SIM115 - closed when validation ends
            except OSError as error:
                words = f"`folder` is {str(self._folder)!r}, where nothing can be written: {error.strerror}."
                raise SettingsError(words) from error

    @property
    def _partial(self) -> Path:
        return self._folder / f".{self._name}.jsonl.partial"

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: OptimizerStep,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch, of all devices, in the order of the data."""
        loader = cast(PlanLoader, trainer.val_dataloaders)
        scored = list(self._scored(loader.dataset.examples_of(batch_idx), outputs, batch))
        of_all = [row for part in gathered(scored, trainer.world_size) for row in part]
        for row in sorted(of_all, key=lambda row: row.index):
            self._write(row)

    def _scored(
        self, examples: Sequence[Sequence[int]], outputs: Sequence[ResponseScores], batch: OptimizerStep
    ) -> Iterator[ScoredRow]:
        for indices, scores in zip(examples, outputs, strict=True):
            assert scores.is_top1 is not None
            columns = torch.stack([scores.log_probs, scores.token_entropy, scores.is_top1.to(scores.log_probs)]).cpu()
            read = self._reader.read(indices)
            parts = columns.split([example.num_response_labels for example in read], dim=1) if read else ()
            for index, example, part in zip(indices, read, parts, strict=True):
                location = full_location(example.location, self._rows.only_source)
                yield ScoredRow.of(index, location, example, part, self._data.tokenizer)

    def _write(self, row: ScoredRow) -> None:
        self._num_seen += 1
        self._total_loss += row.loss * row.response_length if math.isfinite(row.loss) else 0.0
        if self._file is None:
            return
        push = heapq.heappush if len(self._hardest) < self._num_rows else heapq.heappushpop
        hardness = row.loss if math.isfinite(row.loss) else math.inf
        push(self._hardest, (hardness, -row.index, self._file.tell()))
        self._file.write(json.dumps(row.to_json(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the page."""
        names = ("loss", "perplexity", "token_accuracy", "token_entropy")
        found = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in names}
        summary = found | {"num_rows": float(self._num_seen)}
        page, lines = (self._folder / f"{self._name}.{ending}" for ending in ("html", "jsonl"))
        self.inspection = Inspection(page, lines, summary)
        if self._file is None:
            return
        self._file.close()
        title = f"{self._data.split} rows, step {cast(SFTModule, pl_module).num_steps_taken}"
        write_rows_page(page, self._shown(), summary, title=title, num_rows=self._num_seen)
        self._partial.replace(lines)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no part of a file."""
        if self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _shown(self) -> list[dict[str, Any]]:
        """The hardest rows, read back from the file."""
        rows = []
        with open(self._partial, "rb") as file:
            for _, _, place in sorted(self._hardest, reverse=True):
                file.seek(place)
                row = json.loads(file.readline())
                loss = (row["loss"] or 0.0) * row["response_length"]
                row["share"] = loss / self._total_loss if self._total_loss else 0.0
                rows.append(row)
        return rows
