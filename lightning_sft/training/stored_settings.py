"""Arguments of `SFTModule` that a checkpoint holds."""

import inspect
from collections.abc import Mapping
from typing import Any, Self

import lightning as L
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from lightning_sft.data.fixed_settings import FixedSettings, is_of_package, refuse_change
from lightning_sft.data.rows.shown import shown_settings
from lightning_sft.errors import SettingsTypeError

# Their key in a checkpoint. What is under Lightning's own key, "hyper_parameters", a `LightningCLI` would prefer to
# what it is given, and pass to any class that it makes (pytorch-lightning#20801).
HYPER_PARAMETERS = "module_hyper_parameters"
_STORED = (  # those that it can hold without pickling code
    *("loss_normalization", "normalize_constant", "loss_type", "label_smoothing", "neftune_noise_alpha"),
    *("max_grad_norm", "lr_scheduler", "warmup_steps", "parameter_groups", "freeze", "lora", "seed"),
)


class StoredModule(FixedSettings, L.LightningModule):
    """A module whose checkpoints hold its arguments, and which loads from these."""

    CHECKPOINT_HYPER_PARAMS_KEY = HYPER_PARAMETERS

    def __getattr__(self, name: str) -> Any:
        """Called for what is no attribute, such as a model that is not there yet."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "model":
                raise
            raise AttributeError(
                f"`{type(self).__name__}` has no `model` yet. A trainer loads it when it fits or evaluates. To have it "
                "before, call `configure_model()`."
            ) from None

    @_restricted_classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: N805
        """Load a module from a checkpoint; further arguments are those of the class, in place of the stored ones.

        Raises:
            SettingsTypeError: If the class has no such argument, which Lightning would leave out in silence.
        """
        names = inspect.signature(super().load_from_checkpoint).parameters.keys() | {"self"}
        own = inspect.signature(cls.__init__).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in own.values())
        for name in () if takes_any else kwargs.keys() - names - own.keys():
            raise SettingsTypeError(
                f"`load_from_checkpoint` is given `{name}`, no argument of `{cls.__name__}`. Its arguments are "
                f"{', '.join(f'`{each}`' for each in own if each != 'self')}."
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)


def keep_settings(module: StoredModule, arguments: Mapping[str, Any]) -> None:
    """Keep a module's arguments in `settings`, and in its checkpoints those that they can hold; fixed from now on.

    They are stored by value: given names, Lightning would look for arguments of a subclass, which may have others.
    """
    module.save_hyperparameters({name: arguments[name] for name in _STORED}, logger=False)
    module.settings = shown_settings(arguments)


def check_stored(module: object) -> None:
    """Refuse `hparams` that were changed after a module was made: nothing but its checkpoints would know of it."""
    if isinstance(module, StoredModule) and is_of_package(type(module)):
        for name, given in module.hparams_initial.items():
            if module.hparams.get(name) != given:
                refuse_change(module, f"hparams.{name}", module.hparams.get(name), given)
