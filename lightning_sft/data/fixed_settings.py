"""What is made with settings, and keeps them."""

from typing import Any, NoReturn, Self

import lightning as L

from lightning_sft.data.rows.shown import shown_settings
from lightning_sft.errors import SettingsError, shorten


class FixedSettings:
    """What keeps the `settings` it was made with: an attribute that is set to another value would change nothing."""

    settings: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if is_of_package(type(self)):
            settings = vars(self).get("settings", {})
            given = settings if isinstance(settings, dict) else vars(settings)
            if name in given and name != "model" and not _is_same(value, given[name]):
                refuse_change(self, name, value, given[name])
        super().__setattr__(name, value)


def is_of_package(kind: type) -> bool:
    """Whether a class is not a user's own, which may use the names of settings for what it likes, and store them."""
    return kind.__module__.startswith("lightning_sft.")


def _is_same(value: Any, given: Any) -> bool:
    """Whether a value is the given one, which may stand there as it is shown."""
    shown = shown_settings({"": value})[""]
    return value is given or any(type(each) is type(given) and each == given for each in (value, shown))


def refuse_change(holder: object, name: str, value: object, given: object) -> NoReturn:
    """Refuse another value for a setting of an object that keeps the one it was made with."""
    kind = type(holder).__name__
    raise SettingsError(
        f"`{name}` is set to {shorten(value)}, but the `{kind}` was made with {shorten(given)} and keeps that. Make a "
        f"new `{kind}` with the other value."
    )


class FixedDataModule(FixedSettings, L.LightningDataModule):
    """A datamodule whose settings no checkpoint holds, unless a subclass saves its own by `save_hyperparameters`."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Self:
        """A datamodule of a subclass that saves its hyperparameters; others would have defaults for all settings.

        Raises:
            SettingsError: If the class saves none.
        """
        if not is_of_package(cls):
            loaded = super().load_from_checkpoint(*args, **kwargs)
            if loaded.hparams:
                return loaded
        raise SettingsError(
            f"Checkpoints hold no settings of the data. Make a `{cls.__name__}` with its arguments, which the run's "
            "config.yaml names, and pass the checkpoint to `trainer.fit` or `trainer.validate` as `ckpt_path`."
        )
