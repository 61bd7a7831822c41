"""The parser of a command's settings: configurations by name, and refusals in one line."""

from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.errors import SettingsError, one_line


def packaged_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: beside the package, or inside an installed one."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class ConfigByName(ActionConfigFile):
    """`--config`: the path of a configuration, or the name of one that comes with the package.

    A file of that name in the working directory comes first.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the configuration."""
        if isinstance(values, str) and not Path(values).is_file():
            values = str(packaged_configs().get(values, values))
        try:
            self.apply_config(parser, cfg, self.dest, values)
        except UnicodeDecodeError as error:
            raise SettingsError(
                f"a configuration is not UTF-8 text ({error.reason}). Save the file as UTF-8."
            ) from error


class SFTArgumentParser(LightningArgumentParser):
    """A parser that refuses in one line, without the usage, which is hundreds of lines long."""

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class; a data file is never taken for a configuration of the argument that has it."""
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
