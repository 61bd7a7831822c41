"""`SFTDataModule`: rows in, optimizer steps out."""

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import accumulate, pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast, get_args

import lightning as L
import numpy as np
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_integer, check_type
from lightning_sft.data.chat_encoding import TrainOnTurns
from lightning_sft.data.chat_template import read_chat_template, with_chat_template
from lightning_sft.data.encoded_rows import EncodedRows, content_hash, encode_rows, read_numbers
from lightning_sft.data.encoding import Encoding, RowEncoder, TooLong
from lightning_sft.data.marked_rows import marked_rows
from lightning_sft.data.mixture import WeightedSource, open_weighted, read_weights, weighted_sources
from lightning_sft.data.plan import BatchPlan, Layout, MicrobatchShape, StepRule
from lightning_sft.data.preview import Preview, SplitStatistics
from lightning_sft.data.prompt_rows import render_prompts
from lightning_sft.data.prompts import Prompt, PromptLoader
from lightning_sft.data.row_format import Row, RowFormat
from lightning_sft.data.shown import shown_data
from lightning_sft.data.sources import Data, Source, open_sources
from lightning_sft.data.step_loader import StepDataset, StepLoader, plan_steps
from lightning_sft.data.stream import RowStream, StreamedSteps, StreamLoader, first_rows, open_streams
from lightning_sft.data.tokenization import pad_token_id
from lightning_sft.data.tokenizer import load_tokenizer
from lightning_sft.errors import SettingsError, SettingsTypeError, shorten
from lightning_sft.trainer_loops import restore_settings, show_one_long_epoch, streamed_steps

_ENDLESS = 2**31
_NUM_SOURCES_NAMED = 20  # in one message
_NUM_FIRST_ROWS = 1000  # of a stream
_SPLITS = {
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: ("predict",),
}


class SFTDataModule(L.LightningDataModule):
    """Prompt/output rows or conversations, tokenised once and handed out as whole optimizer steps.

    A batch of `train_dataloader` is an `OptimizerStep`, everything that one optimizer step needs on this device: its
    `microbatches`, each with `input_ids`, `labels` and `response_mask`, padded or packed; and the step's `totals` over
    all microbatches and devices. Validation and test batches are the same, in the order of the file. A notebook shows a
    batch with its tokens coloured by the mask.

    To the trainer the whole training is one long epoch: `max_epochs` and a fractional `val_check_interval` are turned
    into numbers of optimizer steps before it starts, so that every count in a run counts optimizer steps.

    Rows with `messages` or `conversations`, or with lists of messages as prompt and output (or `completion`), are
    written by the tokenizer's chat template, with the row's `tools` and `chat_template_kwargs` if it has them. A column
    `system` beside them is their first turn. The response is the assistant's turns, each with the token that ends it; a
    turn with the `weight` 0 is not part of it.

    Args:
        tokenizer: Name, path or object; on the command line it is the model's unless given.
        train_data: A JSONL, JSON, CSV or Parquet file, a glob pattern, a hub data set (`name`, `name:config` or
            `name:config:split`; `name@revision:...` for a commit, branch or tag), or a list of these; in Python also a
            list of dictionaries or a `datasets.Dataset`.
            Or `{source: weight}`: how many times an epoch goes through each source's rows. Of `n` rows it takes
            `round(n * weight)`, from where the epoch before stopped, so that none is taken twice before the others are
            taken once; the rows of all sources are shuffled together.
        val_data: Likewise, for validation.
        test_data: Likewise, for `test`.
        predict_data: Likewise, for `predict`; these rows need no output. Default: the validation rows.
        val_fraction: Without `val_data`: this share of the training rows, drawn by `seed`, is for validation. Each of
            them counts once, whatever its source's weight; the weights are of the other rows.
        prompt_field: Column with the text before the response.
        output_field: Column with the response.
        ground_truth_field: Column with the reference answer, for rewards. Rows without the default column use the
            output.
        prompt_template: Text with `{column}` in it, or a file with such a text. Literal braces are doubled.
        row_transform: Function called with each row first; returns the row to use instead.
        chat_template: For rows with messages, instead of the tokenizer's own: its text or a file.
        chat_template_kwargs: More that the chat template can use, by name.
        train_on_turns: Which of the assistant's turns in a row are the response: `all`, or the `last`.
        batch_size: Sequences per optimizer step, over all devices.
        gradient_accumulation_steps: Microbatches per device and optimizer step. Neither this nor the next: one.
        max_tokens_per_microbatch: Split each step by memory instead: the most tokens, padding included, in one
            microbatch.
        layout: `packed`: the sequences of a microbatch in one row, without padding, each attending to itself alone;
            `padded`: one row for each, filled up to the longest. The results are the same. By default packed where
            the model can take it.
        max_length: The most tokens of prompt and response together, EOS included. No limit if None.
        too_long: What happens to longer rows: `error`; `drop` them; `truncate` the end, losing the EOS.
        append_eos: Whether every response ends in EOS, so that the model learns to stop. Turns of messages end as the
            chat template has it, whatever this says.
        seed: Of the order of the rows and of the validation split.
        streaming: Read and tokenise the training rows, of files or data sets by name, while training rather than
            before, and start over at their end. The run is as long as `trainer.max_steps`, and one epoch to whatever
            counts these. Every process reads and tokenises all rows of a step. A run that continues skips what it has
            read of a JSONL, JSON or CSV file; Parquet files and data sets are found where they were left.
        shuffle_buffer: With `streaming`: so many rows are read, shuffled and trained on before the next are read; 1
            keeps the order of the data.
        num_workers: Processes that collate batches ahead of time; with `streaming` at most 1, which also reads and
            tokenises.
        num_proc: Processes that tokenise. By default one for each 20,000 rows, at most 8.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range or two exclude each other. Rows are checked before training starts.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        train_data: Data | Mapping[str, Any] | None = None,
        val_data: Data | None = None,
        test_data: Data | None = None,
        predict_data: Data | None = None,
        val_fraction: float = 0.0,
        prompt_field: str = "prompt",
        output_field: str = "output",
        ground_truth_field: str = "ground_truth",
        prompt_template: str | None = None,
        row_transform: Callable[[dict[str, Any]], Row] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        train_on_turns: TrainOnTurns = "all",
        batch_size: int = 32,
        gradient_accumulation_steps: int | None = None,
        max_tokens_per_microbatch: int | None = None,
        layout: Layout | None = None,
        max_length: int | None = None,
        too_long: TooLong = "error",
        append_eos: bool = True,
        seed: int = 0,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            raise SettingsError("`tokenizer` is missing; expected a name, a path or a tokenizer.")
        check_type("tokenizer", tokenizer, (str, Path, PreTrainedTokenizerBase), "a name, a path or a tokenizer")
        check_type("val_fraction", val_fraction, Real, "a share of the rows")
        check_type("streaming", streaming, bool, "true or false")
        check_type("shuffle_buffer", shuffle_buffer, Integral, "a whole number")
        check_integer("num_workers", num_workers, optional=True)
        check_integer("num_proc", num_proc, optional=True)
        counts = (("num_workers", num_workers, 0), ("num_proc", num_proc, 1), ("shuffle_buffer", shuffle_buffer, 1))
        for name, value, least in counts:
            if value is not None and value < least:
                raise SettingsError(f"`{name}` is {value}, expected at least {least}.")
        if layout is not None and layout not in get_args(Layout):
            raise SettingsError(f"`layout` is {layout!r}, expected one of {', '.join(get_args(Layout))}.")
        if not 0.0 <= val_fraction < 1.0:
            raise SettingsError(f"`val_fraction` is {val_fraction}, expected a share of the rows: at least 0, below 1.")
        if val_fraction and val_data is not None:
            raise SettingsError(
                "Both `val_data` and `val_fraction` are given; the validation rows come from one of them."
            )
        self._weights = read_weights(train_data, "train_data") if isinstance(train_data, Mapping) else {}
        if streaming and (val_fraction or isinstance(train_data, Mapping)):
            given = f"`val_fraction` is {val_fraction}" if val_fraction else "`train_data` has weights"
            raise SettingsError(
                f"{given}, but with `streaming` nobody knows how many training rows there are. Give `val_data` and a "
                "list of sources, or leave out `streaming`."
            )
        if streaming and num_workers > 1:
            raise SettingsError(
                f"`num_workers` is {num_workers}, expected 0 or 1 with `streaming`, which reads one row after another."
            )
        self._tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        self._data = {"train": train_data, "val": val_data, "test": test_data, "predict": predict_data}
        for split in ("val", "test", "predict"):
            if isinstance(data := self._data[split], Mapping):
                read_weights(data, f"{split}_data")  # refuses a `DatasetDict` in its own words
                raise SettingsTypeError(
                    f"`{split}_data` is {shorten(data)}, but weights are for `train_data` alone. "
                    "Give a list of the sources."
                )
        columns, chat = (prompt_field, output_field, ground_truth_field), (train_on_turns, chat_template_kwargs)
        self._row_format = RowFormat(*columns, prompt_template, row_transform, *chat)
        self._chat_template = None if chat_template is None else read_chat_template(chat_template)
        self._encoding = Encoding(max_length, too_long, append_eos)
        self._num_proc = num_proc
        self._val_fraction = val_fraction
        self._rule = StepRule(batch_size, gradient_accumulation_steps, max_tokens_per_microbatch, seed)
        self.layout = layout
        self._num_workers = num_workers
        self.streaming, self._shuffle_buffer = streaming, shuffle_buffer
        self._streams: list[RowStream] = []
        self._places: dict[int, dict[str, Any]] = {}  # in the stream, by the number of optimizer steps taken
        self._stream_order: dict[str, Any] = {}
        self._rows: dict[str, Dataset] = {}
        self._weighted: list[WeightedSource] = []  # of the training rows; empty if an epoch takes every row once
        self._num_too_long: dict[str, tuple[int, int]] = {}
        self._plans: dict[str, BatchPlan] = {}
        self._identity: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._trainer_settings: dict[str, Any] | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself; loaded when first asked for."""
        tokenizer = load_tokenizer(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer
        return tokenizer if self._chat_template is None else with_chat_template(tokenizer, self._chat_template)

    # -- rows ----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise on one process of each machine; the others then find the result in the cache."""
        self._load_rows(self.trainer.state.fn or TrainerFn.FITTING if self.trainer else TrainerFn.FITTING)

    def setup(self, stage: str) -> None:
        """Load the rows of the stage (`fit`, `validate`, `test` or `predict`) and plan its optimizer steps."""
        self._load_rows(stage)
        if stage == TrainerFn.FITTING:
            self._plan_training()
        for split in ("val", "test"):
            if split in self._rows:
                self._plans[split] = self._plan(split, shuffle=False)

    def _load_rows(self, stage: str) -> None:
        for split in _SPLITS[TrainerFn(stage)]:
            if split in self._rows:
                continue
            if split == "predict":
                self._rows[split] = self._load_prompts()
            elif split == "train" and self.streaming and self._data[split] is not None:
                self._rows[split] = self._open_stream()
            elif self._data[split] is not None:
                self._rows[split] = self._encode(split)
            elif split == "val" and self._val_fraction:
                rows = self._encode("train")
                if len(rows) < 2:
                    raise SettingsError(
                        f"`val_fraction` is {self._val_fraction}, but `train_data` has one row, which cannot be split."
                    )
                numbers = Dataset.from_dict({"row": range(len(rows))})
                parts = numbers.train_test_split(self._val_fraction, seed=self._rule.seed)
                self._rows["val"] = rows.select(read_numbers(parts["test"], "row"))
                self._rows["train"] = rows.select(self._by_source(read_numbers(parts["train"], "row")))
            elif split != "val" or stage == TrainerFn.VALIDATING:
                command = TrainerFn(stage).value
                raise SettingsError(
                    f"`{split}_data` is needed for {command}; expected a file, a data set or a list of rows."
                )

    def _encode(self, split: str) -> Dataset:
        argument, weights = f"{split}_data", self._weights if split == "train" else {}
        if weights:
            sources, counts = open_weighted(weights, argument)
        else:
            sources = open_sources(cast(Data, self._data[split]), argument)
        rows = encode_rows(sources, self._row_format, self.tokenizer, self._encoding, self._num_proc)
        self._report(split, sources, rows)
        if any(weight != 1 for weight in weights.values()):  # or the order is that of a list
            bounds = pairwise([0, *accumulate(counts)])
            self._weighted = weighted_sources(weights, [sum(rows.sizes[start:end]) for start, end in bounds], argument)
        return rows.dataset

    @property
    def _encoder(self) -> RowEncoder:
        return RowEncoder(self._row_format, self.tokenizer, self._encoding)

    def _open_stream(self) -> Dataset:
        """The first rows: they are shown, prompt the model where there are no others, and tell of errors early."""
        self._streams = open_streams(self._data["train"], "train_data")
        rows, num_dropped, num_truncated = first_rows(self._streams, _NUM_FIRST_ROWS, self._encoder)
        self._num_too_long["train"] = (num_dropped, num_truncated)
        if not len(rows):
            raise SettingsError(
                f"`train_data`: all of the first {num_dropped} rows are {self._length_limit}. Raise `max_length`."
            )
        return rows

    def _by_source(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the rows left for training after a split; with weights by source again, and counted anew."""
        if not self._weighted:
            return rows
        bounds = np.cumsum([source.num_rows for source in self._weighted])
        source = np.searchsorted(bounds, rows, side="right")
        sizes = np.bincount(source, minlength=len(bounds)).tolist()
        self._weighted = weighted_sources(self._weights, sizes, "train_data")
        return rows[np.argsort(source, kind="stable")]

    def _report(self, split: str, sources: list[Source], rows: EncodedRows) -> None:
        kept, limit = len(rows.dataset), self._length_limit
        self._num_too_long[split] = (rows.num_dropped, rows.num_truncated)
        if rows.num_dropped:
            lost = [(len(source.rows) - size, source) for source, size in zip(sources, rows.sizes, strict=True)]
            each = ", ".join(f"{num} of {len(source.rows)} of {source.name}" for num, source in lost if num)
            each = f" ({each})" if 1 < len(sources) <= _NUM_SOURCES_NAMED else ""
            rank_zero_info(
                f"{split}_data: dropped {rows.num_dropped} of {kept + rows.num_dropped} rows{each}, {limit}."
            )
        if rows.num_truncated:
            rank_zero_info(
                f"{split}_data: truncated {rows.num_truncated} of {kept + rows.num_dropped} rows, {limit}; "
                "their responses lose the end and the EOS."
            )
        if not kept:
            raise SettingsError(f"`{split}_data`: all {rows.num_dropped} rows are {limit}. Raise `max_length`.")

    @property
    def _length_limit(self) -> str:
        return f"longer than `max_length` = {self._encoding.max_length} tokens"

    def _load_prompts(self) -> Dataset:
        if self._data["predict"] is None:
            if self._data["val"] is None and not self._val_fraction:
                raise SettingsError(
                    "`predict_data` is needed for predict, as there is no `val_data` to take prompts from."
                )
            self._load_rows(TrainerFn.VALIDATING)
            return self._rows["val"]
        return render_prompts(open_sources(self._data["predict"], "predict_data"), self._row_format, self.tokenizer)

    def prompts(self, stage: str, num_prompts: int | None = None) -> list[Prompt]:
        """The first prompts of a stage.

        Those of `fit` and `validate` are the validation rows, or the training rows where there are none.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            num_prompts: How many; all if None.
        """
        order = ("val", "train") if stage in ("fit", "validate") else (stage,)
        rows = next(self._rows[split] for split in order if split in self._rows)
        rows = rows.select_columns(["prompt", "ground_truth", "is_chat"])
        rows = rows.select(range(min(len(rows), num_prompts or len(rows))))
        return [
            Prompt(index, row["prompt"], row["ground_truth"], row["is_chat"])
            for index, row in enumerate(rows.to_list())
        ]

    def preview(self, num_rows: int = 3) -> Preview:
        """The first training rows as the model will see them, and statistics of training and validation rows.

        `print` it, or let a notebook show it.

        Args:
            num_rows: How many rows.

        Raises:
            TypeError: If `num_rows` is no whole number.
            ValueError: If it is negative, or there are no training rows.
        """
        check_integer("num_rows", num_rows, optional=True)
        if num_rows < 0:
            raise SettingsError(f"`num_rows` is {num_rows}, expected at least 0.")
        self._load_rows(TrainerFn.FITTING)
        plan = self._plan("train")
        names = {"train": f"first {_NUM_FIRST_ROWS:,} rows"} if self.streaming else {}
        splits = {
            names.get(split, split): SplitStatistics(
                read_numbers(self._rows[split], "num_tokens"),
                read_numbers(self._rows[split], "num_response_tokens"),
                *self._num_too_long.get(split, (0, 0)),
                plan.steps_per_epoch if split == "train" and not self.streaming else None,
                {str(source): source.num_rows for source in self._weighted} if split == "train" else {},
            )
            for split in _SPLITS[TrainerFn.FITTING]
            if split in self._rows
        }
        dataset = StepDataset(self._rows["train"], plan, 0, pad_token_id(self.tokenizer), "packed")
        microbatch = dataset.collate(list(range(min(num_rows, len(self._rows["train"])))))
        return Preview(list(marked_rows(microbatch)), splits, self.tokenizer, self._length_limit)

    def facts(self) -> dict[str, Any]:
        """What a model card says: `data`, its names and sizes; `settings`; and the `prompt_template`."""
        if not self._facts:
            for split in ("train", "val"):
                if (rows := self._rows.get(split)) is None:
                    continue
                source = shown_data(self._data[split])
                if split == "train" and self.streaming:
                    self._facts["train"] = f"{source}, streamed"
                    continue
                sizes = {"rows": len(rows)}
                for name, column in (("tokens", "num_tokens"), ("response tokens", "num_response_tokens")):
                    sizes[name] = int(read_numbers(rows, column).sum())
                self._facts |= {split: source, **{f"{split} {name}": size for name, size in sizes.items()}}
        options = vars(self._rule) | vars(self._encoding)
        return {
            "data": dict(self._facts),
            "settings": {name: options[name] for name in ("batch_size", "max_length", "too_long", "seed")},
            "prompt_template": self._row_format.prompt_template,
        }

    # -- optimizer steps -----------------------------------------------------------------------------------------

    def _plan(self, split: str, **options: Any) -> BatchPlan:
        world_size = self.trainer.world_size if self.trainer else 1
        options = {"world_size": world_size} | options
        if split == "train" and self._weighted:
            options["sources"] = [(source.num_rows, source.num_rows_per_epoch) for source in self._weighted]
        num_tokens, num_response_tokens = (
            read_numbers(self._rows[split], column) for column in ("num_tokens", "num_response_tokens")
        )
        return plan_steps(num_tokens, num_response_tokens, self._rule, **options)

    def training_plan(self, world_size: int) -> BatchPlan:
        """The optimizer steps of training; the rows are read if they are not yet.

        Args:
            world_size: Number of devices.
        """
        self._load_rows(TrainerFn.FITTING)
        return self._plan("train", world_size=world_size)

    def row_lengths(self) -> list[int]:
        """Tokens of the training rows as the model sees them, the longest first.

        Of a stream those of its first rows; where `max_length` bounds the others, the longest counts as so long.
        """
        self._load_rows(TrainerFn.FITTING)
        lengths = np.sort(np.maximum(read_numbers(self._rows["train"], "num_tokens") - 1, 1))[::-1].tolist()
        if self.streaming and (limit := self._encoding.max_length) is not None:
            lengths[0] = max(limit - 1, 1)
        return lengths

    def microbatch_limit(self, world_size: int) -> MicrobatchShape:
        """As `BatchPlan.largest_microbatch` gives it, but the most that the settings allow, whatever the data.

        Args:
            world_size: Number of devices.

        Raises:
            ValueError: If they allow anything.
        """
        budget, longest = self._rule.max_tokens_per_microbatch, self._encoding.max_length
        if budget is None and longest is None:
            raise SettingsError(
                "Without data nothing bounds a microbatch. Set `max_tokens_per_microbatch`, or `max_length`."
            )
        limits = [limit for limit in (budget, None if longest is None else longest - 1) if limit is not None]
        length, num_microbatches = min(limits), self._rule.gradient_accumulation_steps or 1
        most = -(-self._rule.batch_size // (world_size * num_microbatches))
        num_sequences = most if budget is None else min(budget // length, most)
        lengths = [length] * num_sequences
        is_split = budget is not None or num_microbatches > 1
        return MicrobatchShape(lengths, lengths, 2 if is_split else 1)

    def _plan_training(self) -> None:
        trainer = self.trainer
        if trainer is None or trainer.limit_train_batches == 0:
            self._plans["train"] = self._plan("train")
            return
        self._restore_trainer()
        limit, num_steps = trainer.limit_train_batches, self._plan("train").steps_per_epoch
        if self.streaming:
            num_steps = streamed_steps(trainer)
        limit = limit if isinstance(limit, int) else max(1, int(limit * num_steps))
        shuffle = trainer.overfit_batches == 0  # type: ignore[attr-defined]
        if self.streaming:
            anew = limit if isinstance(trainer.limit_train_batches, int) else None
            self._stream_order, num_steps = {"shuffle": shuffle, "steps_per_pass": anew}, limit
        else:
            self._plans["train"] = self._plan("train", shuffle=shuffle, limit_steps_per_epoch=limit)
            num_steps = self._plans["train"].steps_per_epoch
        self._trainer_settings = show_one_long_epoch(trainer, num_steps, "val" in self._rows)

    def _restore_trainer(self) -> None:
        if self.trainer is not None and self._trainer_settings is not None:
            restore_settings(self.trainer, self._trainer_settings)
        self._trainer_settings = None

    def teardown(self, stage: str) -> None:
        """Give the trainer back as it was."""
        self._restore_trainer()

    def on_exception(self, exception: BaseException) -> None:
        """Give the trainer back as it was."""
        self._restore_trainer()

    def train_dataloader(self) -> StepLoader:
        """One item for each optimizer step of the run, from the current position on.

        Without a trainer of one epoch; of a stream, which has none, without an end.
        """
        if self.trainer is None or self._trainer_settings is None:  # to look at
            return self._loader("train", _ENDLESS if self.streaming else self._plans["train"].steps_per_epoch)
        # One more than are taken: the run ends by its number of steps, so a finished run can be extended.
        max_steps = self.trainer.max_steps
        num_steps = max_steps + 1 if max_steps >= 0 else _ENDLESS
        # Resumed or not, a run has taken as many of the data's steps as it has taken optimizer steps.
        return self._loader("train", num_steps, lambda: cast(L.Trainer, self.trainer).global_step)

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """The validation rows; nothing if there are none."""
        return self._loader("val", self._plans["val"].steps_per_epoch) if "val" in self._plans else []

    def test_dataloader(self) -> StepLoader:
        """The test rows."""
        return self._loader("test", self._plans["test"].steps_per_epoch)

    def predict_dataloader(self) -> PromptLoader:
        """Lists of `Prompt`, `batch_size` of them for each device: the same lists on every device."""
        world_size = self.trainer.world_size if self.trainer else 1
        return PromptLoader(self.prompts("predict"), self._rule.batch_size * world_size)

    def _loader(self, split: str, num_steps: int, first_step: Callable[[], int] = lambda: 0) -> StepLoader:
        rank = self.trainer.global_rank if self.trainer else 0
        pin = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        how = (rank, pad_token_id(self.tokenizer), self.layout_for(getattr(self.trainer, "lightning_module", None)))
        if split == "train" and self.streaming:
            world_size = self.trainer.world_size if self.trainer else 1
            order = {"shuffle_buffer": self._shuffle_buffer} | self._stream_order
            steps = StreamedSteps(self._streams, self._encoder, self._rule, world_size, *how, **order)
            return StreamLoader(steps, num_steps, self._num_workers, first_step, self._places, self.tokenizer, pin)
        dataset = StepDataset(self._rows[split], self._plans[split], *how)
        return StepLoader(dataset, num_steps, self._num_workers, first_step, self.tokenizer, pin)

    def layout_for(self, module: object) -> Layout:
        """How the microbatches of a module are laid out.

        Args:
            module: It says in `why_not_packed` whether it takes packed ones.

        Raises:
            ValueError: If they are to be packed, and the module cannot take that.
        """
        reason = getattr(module, "why_not_packed", "there is no module that takes packed batches")
        if self.layout == "packed" and reason:
            raise SettingsError(f"`layout` is 'packed', but {reason}. Use 'padded'.")
        return self.layout or ("padded" if reason else "packed")

    # -- resuming ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a run's place in its data depends on, besides its number of optimizer steps."""
        if "train" not in self._rows:
            return {}
        if self.streaming:
            step = self.trainer.global_step if self.trainer else 0
            rule = {name: getattr(self._rule, name) for name in ("batch_size", "seed")}
            return {"streaming": True, "shuffle_buffer": self._shuffle_buffer, **rule, "last": self._places.get(step)}
        if not self._identity:
            rows = self._rows["train"]
            self._identity = {"num_rows": len(rows), "rows": content_hash(rows)}
            self._identity |= {name: getattr(self._rule, name) for name in ("batch_size", "seed")}
            if self._weighted:
                self._identity["weights"] = [[source.num_rows, source.num_rows_per_epoch] for source in self._weighted]
        return self._identity

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make sure that a run continues on the data that it began with.

        Raises:
            ValueError: If the training rows, their sources' weights, `batch_size` or `seed` are not those of the
                checkpoint.
        """
        if not state_dict or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        identity = self.state_dict()
        last = state_dict.get("last")
        self._places = {} if last is None else {last["step"]: last}
        for name in dict.fromkeys(["streaming", *identity, *state_dict]):
            then, now = (state.get(name, False) for state in (state_dict, identity))
            if then == now or name == "last":
                continue
            difference, use = f"`{name}` = {then}, now it is {now}", then
            if name == "rows":
                difference, use = "other training rows or tokens", "those"
            elif name == "weights":
                difference, use = "other weights of the sources in `train_data`", "those"
            raise SettingsError(
                f"The checkpoint was made with {difference}: the run cannot continue at the same place in the data. "
                f"Use {use}, or start anew from the weights."
            )
