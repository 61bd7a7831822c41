"""`SFTDataModule`: rows in, optimizer steps out."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lightning_sft.checks import check_choice, check_integer
from lightning_sft.data.chat.chat_encoding import TrainOnTurns
from lightning_sft.data.chat.chat_template import read_chat_template, with_chat_template
from lightning_sft.data.data_settings import DataSettings
from lightning_sft.data.encoding import Encoding, RowEncoder, TooLong
from lightning_sft.data.fixed_settings import FixedDataModule
from lightning_sft.data.prepared_rows import PreparedRows
from lightning_sft.data.preview import Preview, preview_rows
from lightning_sft.data.row_store import RowStore
from lightning_sft.data.rows.bad_rows import BadRows
from lightning_sft.data.rows.prompts import Prompt, PromptLoader
from lightning_sft.data.rows.row_format import Row, RowFormat
from lightning_sft.data.rows.shown import shown_settings
from lightning_sft.data.rows.sources import Data
from lightning_sft.data.steps.plan import StepRule
from lightning_sft.data.steps.step_loader import LoaderOptions, PlanLoader, StepLoader
from lightning_sft.data.streamed_rows import TrainingRows
from lightning_sft.data.tokens.microbatch import Layout
from lightning_sft.data.tokens.tokenizer import load_tokenizer, name_or_tokenizer
from lightning_sft.errors import SettingsError
from lightning_sft.loops.trainer_state import logged_metrics
from lightning_sft.loops.training_run import EpochLoader, TrainingRun


class SFTDataModule(FixedDataModule):
    """Prompt/output rows or conversations, tokenised once and handed out as whole optimizer steps.

    A batch of `train_dataloader` is an `OptimizerStep`, everything that one optimizer step needs on this device: its
    `microbatches`, each with `input_ids`, `labels` and `response_mask`, padded or packed; and the step's `totals` over
    all microbatches and devices. Packed sequences are kept apart by `microbatch.model_inputs()`, further arguments of
    the model. Validation and test batches are the same, in the order of the file. A notebook displays a batch with its
    tokens coloured by the mask. The end of a run and validations are counted in optimizer steps.

    Rows with `messages`, `conversations` or `conversation`, or with lists of messages as prompt and output (or
    `completion`), are formatted with the tokenizer's chat template, with `tools` and `chat_template_kwargs` of the row,
    and its `system` as the first turn. The response is the assistant's turns, each with the token that ends it, except
    for those whose `weight` (or `train`, or `loss`) is 0. Each turn follows exactly the text that the template writes
    when a model is asked for this turn; a row in which a single text cannot show this becomes one example per turn.

    All of a row with only a `text` is learnt, after BOS. A row with `input_ids` is already tokenised and gets no other
    EOS: a token is learnt if it is marked in all of `labels` (-100 or the id itself), `response_mask`,
    `completion_mask` and `assistant_masks` that the row has; if it has none of these, every token is.

    Args:
        tokenizer: Name (or `name@revision`), path or object; on the command line the default is the model's.
        train_data: A JSONL, JSON, CSV, TSV or Parquet file (all but Parquet also with `.gz`, `.bz2`, `.xz` or `.zst`),
            given by path, by a URL that `fsspec` can open, or by a glob pattern; a hub data set (`name`, `name:config`
            or `name:config:split`; `name@revision:...` for a commit, branch or tag), or a folder (`folder::split`) that
            contains files or was written by `save_to_disk`; or a list of these; in Python also a list of dictionaries,
            or a `datasets.Dataset`. Or `{source: weight}`: how many times an epoch goes through each source's rows. Of
            `n` rows an epoch takes `round(n * weight)`, beginning where the previous epoch stopped, so that no row is
            used twice before all have been used once; the rows of all sources are shuffled together.
        val_data: The validation rows, given like `train_data`, but without weights. Or `{name: data}`: several sets, of
            which each is also evaluated by itself, as `val/<name>/loss` beside `val/loss`, that of all rows.
        test_data: The rows that `test` evaluates, given like `val_data`.
        predict_data: The rows whose prompts `predict` continues. They need no output. Default: the validation rows.
        val_fraction: Without `val_data`: this fraction of the training rows, drawn by `seed`, is used for validation,
            each row once, whatever its source's weight, which applies to the others.
        prompt_field: Column with the text before the response.
        output_field: Column with the response. A row without the default column uses `completion`.
        ground_truth_field: Column with the reference answer, for rewards. Without the default column: the output.
        prompt_template: Text with `{column}` in it, or a file with such a text. Write literal braces twice.
        row_transform: Function that is first called with each row and returns the row to use instead. Ready for common
            formats are `lightning_sft.alpaca_row`, `lightning_sft.query_row` and `lightning_sft.chosen_row`.
        row_filter: Function called with each row as it is read; rows for which it returns false are skipped.
        text_field: Column with texts of which every token is learnt. Default: `text`, in rows with no prompt or output.
        as_chat: Also format prompt and output with the chat template, preceded by the column `system`.
        chat_template: Template instead of the tokenizer's own: its text, a file, or another tokenizer's name or folder.
        chat_template_kwargs: Further variables for the chat template, by name.
        train_on_turns: Which of the assistant's turns in a row are learnt: `all`, or only the `last`.
        train_on_prompts: Whether every token is learnt: also of prompts, and of all turns of a conversation.
        batch_size: Sequences per optimizer step, over all devices; each example of a conversation counts as one.
        gradient_accumulation_steps: Number of microbatches into which each device splits its part of a step; default 1.
        max_tokens_per_microbatch: Split each step so that no microbatch has more tokens than this, padding included.
        layout: `packed`: the sequences of a microbatch in one row, each attending only to itself; `padded`: one row per
            sequence. The results are the same. Default: packed in a run, if the model supports it.
        max_length: Maximum number of tokens of prompt and response together, EOS included. None: no limit.
        too_long: What to do with longer rows: `error`; `drop` them; `truncate` the end, which loses the EOS.
        append_eos: Whether every response ends in EOS, so that the model learns to stop; an output that already does
            gets no second one. Turns of messages end as in the chat template, or in EOS if no special token ends them.
        bad_rows: What to do with malformed rows, and with those that the chat template refuses: `error`; `drop` skips
            them, counts them by kind of error, and shows the first of each kind.
        seed: Seed of the order of the rows and of the validation split.
        streaming: Read and tokenise the training rows during training, not before it: for data too large to prepare, in
            files or data sets given by name. As the number of rows is not known, `trainer.max_steps` gives the length
            of the run, and the data begins again where it ends. Every process reads all rows and tokenises its share of
            them. A run that continues reads a text file from its start and skips the rows already used; Parquet files
            and data sets continue where they stopped.
        shuffle_buffer: With `streaming`, rows are read and shuffled in blocks of this many; 1 keeps their order.
        num_workers: Processes that collate batches ahead of time; with `streaming` at most 1, which also tokenises.
        num_proc: Processes that tokenise. Default: one per 20,000 rows, at most 8 and at most one per core.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        SettingsError: If an argument is out of range, or two exclude each other. Rows are checked before training.
    """

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        train_data: Data | Mapping[str, Any] | None = None,
        val_data: Mapping[str, Any] | Data | None = None,
        test_data: Mapping[str, Any] | Data | None = None,
        predict_data: Data | None = None,
        val_fraction: float = 0.0,
        prompt_field: str = "prompt",
        output_field: str = "output",
        ground_truth_field: str = "ground_truth",
        prompt_template: str | None = None,
        row_transform: Callable[[dict[str, Any]], Row] | None = None,
        row_filter: Callable[[dict[str, Any]], bool] | None = None,
        text_field: str | None = None,
        as_chat: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        train_on_turns: TrainOnTurns = "all",
        train_on_prompts: bool = False,
        batch_size: int = 32,
        gradient_accumulation_steps: int | None = None,
        max_tokens_per_microbatch: int | None = None,
        layout: Layout | None = None,
        max_length: int | None = None,
        too_long: TooLong = "error",
        append_eos: bool = True,
        bad_rows: BadRows = "error",
        seed: int = 0,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        self.settings = shown_settings(locals())
        self._tokenizer = name_or_tokenizer(tokenizer)
        check_choice("layout", layout, Layout, optional=True)
        data = (train_data, val_data, test_data, predict_data)
        self._data = DataSettings(*data, val_fraction, streaming, shuffle_buffer, num_workers, num_proc)
        columns = (prompt_field, output_field, ground_truth_field, prompt_template, row_transform)
        chat = (train_on_turns, chat_template_kwargs, as_chat)
        self._row_format = RowFormat(*columns, *chat, row_filter, text_field, train_on_prompts)
        self._chat_template = None if chat_template is None else read_chat_template(chat_template)
        self.encoding = Encoding(max_length, too_long, append_eos, bad_rows)
        self.rule = StepRule(batch_size, gradient_accumulation_steps, max_tokens_per_microbatch, seed)
        self.layout, self.streaming, self._rows = layout, streaming, RowStore(self._data, self.rule)
        self._run: TrainingRun | None = None
        self.run_state: dict[str, Any] = {}  # also of one that has ended

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself; loaded when first asked for."""
        tokenizer = load_tokenizer(self._tokenizer) if isinstance(self._tokenizer, str) else self._tokenizer
        return tokenizer if self._chat_template is None else with_chat_template(tokenizer, self._chat_template)

    def __str__(self) -> str:
        return str(self._rows)

    # -- hooks, in the order in which Lightning calls them -----------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise in one process of each machine; the others then read the result from the cache."""
        stage = self.trainer.state.fn if self.trainer else None
        self._rows.keep_error(lambda: self._load_rows("fit" if stage is None else stage.value))

    def setup(self, stage: str) -> None:
        """Load the rows of the stage (`fit`, `validate`, `test` or `predict`) and plan its optimizer steps."""
        self._rows.raise_kept_error()
        self._load_rows(stage)
        self._rows.check_lengths()
        if stage == "fit" and self.trainer is not None and self.trainer.limit_train_batches != 0:
            SFTDataModule.teardown(self, stage)  # not a subclass's, which may do more
            own = type(self).val_dataloader is not SFTDataModule.val_dataloader  # of whatever rows
            self._run = TrainingRun(self.trainer, self.training_rows, has_validation=own or self._rows.val is not None)
            self.run_state = self._run.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise a `SettingsError` if a run would not continue on the data that it began with."""
        if state_dict and self._run is not None:
            self.training_rows.resume({name: value for name, value in state_dict.items() if name != "run"})
            self._run.check(state_dict.get("run", {}))

    def train_dataloader(self) -> StepLoader | EpochLoader:
        """The epoch's remaining `OptimizerStep`s; without a trainer each pass is the next epoch, a stream endless."""
        if self._run is None:
            return self.training_rows.loader(None, None, self._loader_options())
        return self._run.by_epochs(self.training_rows.loader(self._run.epoch, self._run, self._loader_options()))

    def val_dataloader(self) -> PlanLoader | list[PlanLoader]:
        """The validation rows, or each set of them; nothing if there are none."""
        rows = self.rows_of("val") if self._data.has_validation else None
        return [] if rows is None else cast(PreparedRows, rows).by_sets(self._loader_options())

    def test_dataloader(self) -> PlanLoader | list[PlanLoader]:
        """The test rows, or each set of them."""
        return cast(PreparedRows, self.rows_of("test")).by_sets(self._loader_options())

    def predict_dataloader(self) -> PromptLoader:
        """Lists of `batch_size` `Prompt`s per device, the same lists on every device."""
        return PromptLoader(self.prompts("predict"), self.rule.batch_size * self._loader_options().world_size)

    def state_dict(self) -> dict[str, Any]:
        """What a run's position in its data depends on, besides its number of optimizer steps."""
        rows, run = self._rows.train, self.run_state | {"metrics": logged_metrics(self.trainer)}
        return {} if rows is None else rows.state(self.trainer.global_step if self.trainer else 0) | {"run": run}

    def on_exception(self, exception: BaseException) -> None:
        """Give the trainer back as it was."""
        SFTDataModule.teardown(self, "fit")

    def teardown(self, stage: str) -> None:
        """Give the trainer back as it was."""
        if self._run is not None:
            self._run.end()
        self._run = None

    # -- rows and steps, for whoever works with the datamodule -------------------------------------------------------

    def _load_rows(self, stage: str) -> None:
        self._rows.load(stage, RowEncoder(self._row_format, self.tokenizer, self.encoding))

    @property
    def training_rows(self) -> TrainingRows:
        """The training rows; read when first asked for."""
        return self.rows_of("train")

    def rows_of(self, split: str) -> TrainingRows:
        """The rows of a split; read when first asked for.

        Args:
            split: `train`, `val` or `test`.
        """
        if getattr(self._rows, split) is None:
            self._load_rows({"train": "fit", "val": "validate", "test": "test"}[split])
        return cast(TrainingRows, getattr(self._rows, split))

    def prompts(self, stage: str, num_prompts: int | None = None) -> list[Prompt]:
        """The first prompts of a stage; its rows are read when first asked for.

        Those of `fit` are the validation rows, or the training rows where there are none.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            num_prompts: How many; all if None.
        """
        self._load_rows(stage)
        return self._rows.prompts(stage, num_prompts)

    def preview(self, num_rows: int = 3) -> Preview:
        """The first training rows as the model will see them, and statistics: `print` it, or let a notebook show it.

        Args:
            num_rows: How many rows.

        Raises:
            SettingsTypeError: If `num_rows` is no whole number.
            SettingsError: If it is negative, or there are no training rows.
        """
        check_integer("num_rows", num_rows, at_least=0)
        self._load_rows("fit")
        return preview_rows(self.training_rows, self._rows.val, num_rows, self.tokenizer, self.encoding)

    def facts(self) -> dict[str, Any]:
        """What a model card says: `data`, its names and sizes; `settings`; and the `prompt_template`."""
        options = vars(self.rule) | vars(self.encoding)
        settings = {name: options[name] for name in ("batch_size", "max_length", "too_long", "seed")}
        return {"data": self._rows.facts(), "settings": settings, "prompt_template": self._row_format.prompt_template}

    def layout_for(self, module: object) -> Layout:
        """The layout that the user has chosen, or else packed if the module supports it.

        Args:
            module: Whose `why_not_packed` is the reason why it does not; empty if it does.

        Raises:
            SettingsError: If they are to be packed, and the module cannot take that.
        """
        reason = getattr(module, "why_not_packed", "there is no module that takes packed batches")
        if self.layout == "packed" and reason:
            raise SettingsError(f"`layout` is 'packed', but {reason}. Use 'padded'.")
        return self.layout or ("padded" if reason else "packed")

    def _loader_options(self) -> LoaderOptions:
        module = getattr(self.trainer, "lightning_module", None)
        is_running = self.trainer is not None and self.trainer.state.status == "running"
        return LoaderOptions(
            self.tokenizer,
            self.layout_for(module if is_running or self.layout else None),
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            num_workers=self._data.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            num_positions=getattr(module, "num_positions", None),
        )
