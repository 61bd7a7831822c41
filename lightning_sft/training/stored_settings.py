"""Arguments of `SFTModule` that a checkpoint holds."""

from collections.abc import Mapping
from typing import Any

import lightning as L

# Their key in a checkpoint. What stands under Lightning's own key, "hyper_parameters", any `LightningCLI` prefers to
# what it is given, and takes for arguments of whatever class it is to make (#20801).
HYPER_PARAMETERS = "module_hyper_parameters"
_STORED = (  # those that it can hold without pickling code
    *("loss_normalization", "normalize_constant", "loss_type", "label_smoothing", "neftune_noise_alpha"),
    *("max_grad_norm", "lr_scheduler", "warmup_steps", "parameter_groups", "freeze", "lora", "seed"),
)


def store_settings(module: L.LightningModule, arguments: Mapping[str, Any]) -> None:
    """Let the checkpoints of a module hold what they can of its arguments.

    They are stored by value. Given their names, Lightning would look for the arguments of a subclass, which may lack
    them or mean something else by them.
    """
    module.save_hyperparameters({name: arguments[name] for name in _STORED}, logger=False)
