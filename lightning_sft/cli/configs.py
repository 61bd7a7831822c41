"""The configurations that come with the package."""

from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile

from lightning_sft.errors import SettingsError


def packaged_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: beside the package, or inside an installed one."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


class ConfigByName(ActionConfigFile):
    """A configuration's path, or the name of one that comes with the package, unless there is a file of that name."""

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
