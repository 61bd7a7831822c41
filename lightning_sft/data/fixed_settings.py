"""What is made with settings, and keeps them."""

from typing import Any, NoReturn

import lightning as L

from lightning_sft.data.rows.shown import shown_settings
from lightning_sft.errors import SettingsError, shorten


class FixedSettings:
    """What keeps the `settings` it was made with: an attribute that is set to another value would change nothing.

    Classes of a user's own may use the names for what they like.
    """

    settings: Any

    def __setattr__(self, name: str, value: Any) -> None:
        settings = vars(self).get("settings", {})
        given = settings if isinstance(settings, dict) else vars(settings)
        if name in given and name != "model" and not _is_same(value, given[name]):
            refuse_change(self, name, value, given[name])
        super().__setattr__(name, value)


def _is_same(value: Any, given: Any) -> bool:
    """Whether a value is the given one, which may stand there as it is shown."""
    shown = shown_settings({"": value})[""]
    return value is given or any(type(each) is type(given) and each == given for each in (value, shown))


def refuse_change(holder: object, name: str, value: object, given: object) -> None:
    """Refuse another value for a setting of an object of this package; not of a user's own subclass."""
    kind = type(holder)
    if kind.__module__.startswith("lightning_sft."):
        raise SettingsError(
            f"`{name}` is set to {shorten(value)}, but the `{kind.__name__}` was made with {shorten(given)} and keeps "
            f"that. Make a new `{kind.__name__}` with the other value."
        )


class FixedDataModule(FixedSettings, L.LightningDataModule):
    """A datamodule whose settings no checkpoint holds."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: what it returned would have defaults for all settings that are not given here.

        Raises:
            SettingsError: Always.
        """
        raise SettingsError(
            f"Checkpoints hold no settings of the data. Make a `{cls.__name__}` with its arguments, which the run's "
            "config.yaml names, and pass the checkpoint to `trainer.fit` or `trainer.validate` as `ckpt_path`."
        )
