"""`PredictionWriter`: what `predict` writes, and how it goes on where it was interrupted."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning as L

from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.errors import SettingsError
from lightning_sft.generation.predictions import EarlierPredictions, PredictionFile, prediction_run
from lightning_sft.generation.records import GenerationRecord
from lightning_sft.generation.settings import GenerationSettings
from lightning_sft.training.module import SFTModule
from lightning_sft.training.run_folder import writes_files

Generator = Callable[[Sequence[Prompt]], Sequence[GenerationRecord]]


class PredictionWriter:
    """Appends the records of each batch to a file. A run that was interrupted generates only what the file lacks.

    `path` is the `predict_path` of a `GenerationMonitor`, and `settings` are those by which it makes records.
    """

    def __init__(self, path: str | Path | None, settings: GenerationSettings) -> None:
        self._path, self._settings = path, settings
        self._earlier = EarlierPredictions()

    def start(self, trainer: L.Trainer, module: SFTModule, prompts: Sequence[Prompt], generate: Generator) -> Generator:
        """Find out what an earlier run has left to do, and return what makes the records of a batch.

        That is `generate`, but what an earlier run has done is not generated again: its records are those of the file,
        or none if the trainer does not return them. A file of anything but records of this run is refused. `prompts`
        are all that there are to predict, in their order.
        """
        run = prediction_run(module.model, prompts, self._settings)
        path = Path(self._path or Path(trainer.default_root_dir) / "predictions" / f"{run}.jsonl").expanduser()
        self._file = PredictionFile(path, run, self._settings.sampling.num_samples)
        found: EarlierPredictions | Exception = EarlierPredictions()
        if writes_files(trainer):
            try:
                found = self._file.resume(keep_records=trainer.predict_loop.return_predictions)
            except (SettingsError, OSError) as error:  # for the others, too, which wait for this
                found = error
        found = trainer.strategy.broadcast(found)
        if isinstance(found, Exception):
            raise found
        self._earlier = found
        if found.num_prompts and trainer.is_global_zero:
            print(f"{path} has {found.num_prompts:,} of {len(prompts):,} prompts; continuing with the next.")
        return partial(self._complete, generate)

    def _complete(self, generate: Generator, prompts: Sequence[Prompt]) -> list[GenerationRecord]:
        """Records of all prompts of a batch."""
        num_samples = self._settings.sampling.num_samples
        earlier = self._earlier.records[prompts[0].index * num_samples : (prompts[-1].index + 1) * num_samples]
        new = [prompt for prompt in prompts if prompt.index >= self._earlier.num_prompts]
        return [*earlier, *(generate(new) if new else [])]

    def append(self, trainer: L.Trainer, records: Sequence[GenerationRecord]) -> None:
        """Append those records that the file does not have yet."""
        if writes_files(trainer):
            self._file.append([record for record in records if record.index >= self._earlier.num_prompts])

    def end(self, trainer: L.Trainer) -> None:
        """Say where the records are."""
        if writes_files(trainer):
            print(f"Predictions: {self._file.path}")
