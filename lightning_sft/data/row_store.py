"""The rows of each split, read and tokenised when a stage first needs them."""

import math
from collections.abc import Callable, Mapping
from itertools import chain, islice
from typing import Any, Literal, cast

import numpy as np
import torch.distributed as dist
from datasets import Dataset

from lightning_sft.checks import check_choice, check_integer
from lightning_sft.data.data_settings import DataSettings
from lightning_sft.data.encoded_rows import encode_rows, read_numbers
from lightning_sft.data.encoding import RowEncoder
from lightning_sft.data.prepared_rows import PreparedRows
from lightning_sft.data.row_report import report_prompts, report_rows
from lightning_sft.data.rows.mixture import WeightedSource, open_weighted, weighted_sources
from lightning_sft.data.rows.prompt_rows import render_prompts
from lightning_sft.data.rows.prompts import Prompt
from lightning_sft.data.rows.shown import shown_data, shown_settings
from lightning_sft.data.rows.sources import open_sources
from lightning_sft.data.steps.plan import StepRule
from lightning_sft.data.streamed_rows import StreamedRows, TrainingRows
from lightning_sft.errors import SettingsError, counted

Stage = Literal["fit", "validate", "test", "predict"]


class RowStore:
    """Encoded rows by split, and prompts for `predict`; None until a stage that needs them is loaded."""

    def __init__(self, settings: DataSettings, rule: StepRule) -> None:
        self._settings, self._rule = settings, rule
        self.train: TrainingRows | None = None
        self.val: PreparedRows | None = None
        self.test: PreparedRows | None = None
        self.predict: list[Prompt] | None = None
        self._error: SettingsError | None = None
        self._made_by: tuple[object, ...] = ()

    def keep_error(self, load: Callable[[], None]) -> None:
        """Load rows while other processes wait; if there are some, keep an error for `raise_kept_error`.

        Raised here, it would leave them waiting, until each ends with a traceback that says nothing of it.
        """
        try:
            load()
        except SettingsError as error:
            if not _has_others():
                raise
            self._error = error

    def raise_kept_error(self) -> None:
        """Raise the error of any process in all of them; each has to call this."""
        errors: list[SettingsError | None] = [self._error]
        if _has_others():
            errors = [None] * dist.get_world_size()
            dist.all_gather_object(errors, self._error)
        own, self._error = self._error, None
        for error in (own, *errors):
            if error is not None:
                raise error

    def load(self, stage: str, encoder: RowEncoder) -> None:
        """Read and tokenise what a stage needs and is not there yet, or was made before the tokenizer was changed."""
        check_choice("stage", stage, Stage)
        tokenizer = encoder.tokenizer
        made_by = tokenizer, *(getattr(tokenizer, name, None) for name in ("chat_template", "special_tokens_map"))
        if self._made_by != made_by:
            self.train = self.val = self.test = self.predict = None
            self._made_by = made_by
        if stage == "fit":
            self._load_training(encoder)
            self._load_validation(encoder)
        elif stage == "validate":
            self._load_validation(encoder)
            if self.val is None:
                raise _missing("val", stage)
        elif stage == "test" and self.test is None:
            self.test = self._prepare("test", stage, encoder)
        elif stage == "predict" and self.predict is None:
            self.predict = self._load_prompts(encoder)

    def check_lengths(self) -> None:
        """Refuse rows that are loaded and too long for a microbatch."""
        for rows in (self.train, self.val, self.test):
            if rows is not None:
                rows.count_steps()

    def __str__(self) -> str:
        """The rows of each split for which data is given."""
        given = {split: self._settings.of(split) for split in ("train", "val", "test", "predict")}
        return "\n".join(f"{split}_data: {data}" for split, data in shown_settings(given).items() if data is not None)

    def prompts(self, stage: str, num_prompts: int | None) -> list[Prompt]:
        """The first prompts of the rows of a stage that is loaded, as `SFTDataModule.prompts`."""
        check_integer("num_prompts", num_prompts, at_least=0, optional=True)
        if stage == "predict":
            return cast(list[Prompt], self.predict)[:num_prompts]
        of_stage = {"fit": self.val or self.train, "validate": self.val, "test": self.test}
        return _prompts(cast(TrainingRows, of_stage[stage]).rows, num_prompts)

    def facts(self) -> dict[str, Any]:
        """What a model card says of the training and validation rows that are loaded."""
        facts: dict[str, Any] = {}
        for split, rows in (("train", self.train), ("val", self.val)):
            facts |= {} if rows is None else rows.facts(shown_data(self._settings.of(split)))
        return facts

    def _load_training(self, encoder: RowEncoder) -> None:
        if self.train is not None:
            return
        settings = self._settings
        if settings.streaming and settings.train_data is not None:
            self.train = StreamedRows(settings.train_data, encoder, self._rule, settings.shuffle_buffer)
        elif settings.val_fraction:
            self._divide_training(encoder)
        else:
            self.train = self._prepare("train", "fit", encoder)

    def _load_validation(self, encoder: RowEncoder) -> None:
        if self.val is not None:
            return
        if self._settings.val_data is not None:
            self.val = self._prepare("val", "validate", encoder)
        elif self._settings.val_fraction:
            self._divide_training(encoder)

    def _load_prompts(self, encoder: RowEncoder) -> list[Prompt]:
        if self._settings.predict_data is not None:
            sources = open_sources(self._settings.predict_data, "predict_data")
            rendered = render_prompts(sources, encoder.row_format, encoder.tokenizer, encoder.encoding.bad_rows)
            report_prompts("predict_data", rendered)
            return rendered.prompts
        self._load_validation(encoder)
        if self.val is None:
            raise SettingsError("`predict_data` is needed for predict, as there is no `val_data` to take prompts from.")
        return _prompts(self.val.rows, None)

    def _prepare(self, split: str, stage: str, encoder: RowEncoder) -> PreparedRows:
        data, argument = self._settings.of(split), f"{split}_data"
        if data is None:
            raise _missing(split, stage)
        weights = self._settings.weights if split == "train" else {}
        if weights:
            groups = open_weighted(weights, argument)
        elif isinstance(data, Mapping):
            groups = {name: open_sources(part, f"{argument}[{name!r}]") for name, part in data.items()}
        else:
            groups = {argument: open_sources(data, argument)}
        sources = [*chain(*groups.values())]
        encoded = encode_rows(sources, encoder, self._settings.num_proc)
        report_rows(argument, encoded, encoder, sources)
        of_sources = iter(encoded.sizes)
        sizes = {name: sum(islice(of_sources, len(group))) for name, group in groups.items()}
        weighted: list[WeightedSource] = []
        if any(weight != 1 for weight in weights.values()):  # or the order is that of a list
            weighted = weighted_sources(weights, list(sizes.values()), argument)
        sets = sizes if isinstance(data, Mapping) and not weights else {}
        if empty := next((name for name, size in sets.items() if not size), None):
            raise SettingsError(
                f"`{argument}[{empty!r}]` has no rows that can be used: all are too long or malformed. Leave it out."
            )
        return PreparedRows(
            split,
            encoded.dataset,
            self._rule,
            sources=weighted,
            row_numbers=encoded.row_numbers,
            report=encoded.report,
            only_source=sources[0].name if len(sources) == 1 else None,
            sets=sets,
        )

    def _divide_training(self, encoder: RowEncoder) -> None:
        """Take the validation rows from the training rows, by the seed of the order, each with all its examples."""
        whole, fraction = self._prepare("train", "fit", encoder), float(self._settings.val_fraction)
        rows, first_examples = np.unique(whole.row_numbers, return_index=True)
        if math.ceil(fraction * len(rows)) == len(rows):
            raise SettingsError(
                f"`val_fraction` is {fraction}, but `train_data` has {counted(len(rows), 'row')}, of which none would "
                "be left to train on. Lower it, or give `val_data`."
            )
        parts = Dataset.from_dict({"row": range(len(rows))}).train_test_split(fraction, seed=self._rule.seed)
        examples_of_row = np.split(np.arange(len(whole.rows)), first_examples[1:])
        examples = {
            part: np.concatenate([examples_of_row[row] for row in read_numbers(parts[part], "row")])
            for part in ("train", "test")
        }
        self.val = whole.unweighted("val").selected(examples["test"])
        self.train = whole.selected(examples["train"])


def _prompts(rows: Dataset, num_prompts: int | None) -> list[Prompt]:
    """The first prompts of encoded rows; all if None."""
    first = rows.select_columns(["prompt", "ground_truth", "as_written"]).select(range(len(rows))[:num_prompts])
    return [
        Prompt(index, row["prompt"], row["ground_truth"], row["as_written"])
        for index, row in enumerate(first.to_list())
    ]


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _missing(split: str, stage: str) -> SettingsError:
    return SettingsError(f"`{split}_data` is needed for {stage}; expected a file, a data set or a list of rows.")
