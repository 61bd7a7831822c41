"""`HuggingFaceExport`: at the end of a run its model as a Hugging Face folder."""

from pathlib import Path
from typing import cast

import lightning as L

from lightning_sft.checks import check_local, check_type
from lightning_sft.errors import SettingsError
from lightning_sft.export.huggingface import (
    ExportDtype,
    check_adapters_alone,
    check_export_folder,
    check_export_settings,
    export_model,
)
from lightning_sft.training.module import SFTModule
from lightning_sft.training.run_facts import run_facts
from lightning_sft.training.run_folder import run_folder


class HuggingFaceExport(L.Callback):
    """At the end of training, writes the model to a folder that `AutoModelForCausalLM.from_pretrained` loads.

    The folder holds safetensors, configuration, tokenizer with chat template, generation configuration and a model
    card. `lightning-sft export` writes the same from any checkpoint, such as the best.

    Args:
        folder: Where to write; a relative path begins in the run's folder, `<log_dir>`. None: nothing is written.
        dtype: Dtype of the exported weights. Default: that of training: float32 unless the run says otherwise, also
            under `bf16-mixed`.
        merge_lora: Merge adapters (`SFTModule`'s `lora`) into the weights. False: write only the adapters, a folder for
            `peft.PeftModel.from_pretrained(base_model, folder)`.

    Raises:
        SettingsTypeError: If an argument has the wrong type.
        SettingsError: If `dtype` is no dtype, or the folder holds something other than an earlier export.
    """

    def __init__(
        self, folder: str | Path | None = "huggingface", dtype: ExportDtype | None = None, merge_lora: bool = True
    ) -> None:
        super().__init__()
        check_type("folder", folder, (str, Path), "the path of a folder", optional=True)
        check_local("folder", folder)
        check_export_settings(dtype, merge_lora)
        self.folder = folder
        self.dtype = dtype
        self.merge_lora = merge_lora

    def _exported_to(self, trainer: L.Trainer) -> Path | None:
        """The folder of a run's export, None if nothing is exported; every process has to ask."""
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        return run_folder(trainer) / Path(self.folder).expanduser()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a folder with other content, or an export of adapters without any, before anything is loaded."""
        _put_last(self, trainer)
        if stage != "fit" or self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.merge_lora:
            check_adapters_alone(cast(SFTModule, pl_module).builder.lora)
        if trainer.loggers:
            self._check_folder(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse the folder here if no logger names the run's folder before."""
        self._check_folder(trainer)

    def _check_folder(self, trainer: L.Trainer) -> None:
        if (folder := self._exported_to(trainer)) is None:
            return
        exports = [each for each in trainer.callbacks if isinstance(each, HuggingFaceExport)]  # type: ignore[attr-defined]
        folders = [each._exported_to(trainer) for each in exports]
        check_export_folder(folder)
        if folders.count(folder) > 1:
            raise SettingsError(
                f"There are two `HuggingFaceExport`s to {folder}, of which the second would take the place of the "
                "first. Give each a `folder` of its own; on the command line `export` is one."
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the final weights of the run."""
        if (folder := self._exported_to(trainer)) is None:
            return
        model = cast(SFTModule, pl_module).model
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        export_model(model, folder, tokenizer, run_facts(trainer), self.dtype, self.merge_lora)
        trainer.strategy.barrier("HuggingFaceExport")


def _put_last(callback: L.Callback, trainer: L.Trainer) -> None:
    """Put a callback after those that change the weights at the end, such as averages.

    Lightning would do so with a `Checkpoint`, but then make none of its own, and refuse `enable_checkpointing=False`.
    The list is replaced, for Lightning is going through it.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [*(each for each in callbacks if each is not callback), callback]  # type: ignore[attr-defined]
