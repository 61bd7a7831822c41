"""The parser of a command's settings, and how it refuses them."""

from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import one_line


class SFTArgumentParser(LightningArgumentParser):
    """A parser that refuses in one line, without the usage, which is hundreds of lines long."""

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """As it was, but a data file is never taken for a configuration of the argument that names it."""
        options = {"sub_configs": False} if theclass is SFTDataModule else {}
        added: list[str] = super().add_class_arguments(theclass, *args, **(kwargs | options))
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong and where the settings are explained, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        message = one_line(message)
        if message.startswith("Unexpected config:"):
            got = message.removeprefix("Unexpected config:").strip()
            message = f"a configuration holds `name: value` lines, but this one {f'is {got}' if got else 'is empty'}"
        self.exit(2, f"lightning-sft: error: {message.rstrip('.')}. Settings are explained by `{self.prog} --help`.\n")
