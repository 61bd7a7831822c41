"""What a module's state dict holds, and is loaded into.

Checkpoints without frozen weights hold what is trained, and everything that belongs to adapters.
"""

from typing import Any

import lightning as L
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lightning_sft.model.lora import adapter_names
from lightning_sft.model.precision import Precision


def hook_state(module: L.LightningModule, trained_only: bool) -> None:
    """Load weights also into a module whose model is not there yet; leave frozen ones out if `trained_only`.

    Lightning gives the weights of processes that it has started, such as those of `ddp_notebook`, to the module that
    they were started from, where no model was set up.
    """
    module.register_load_state_dict_pre_hook(_build_model)  # type: ignore[no-untyped-call]
    if trained_only:
        module.strict_loading = False
        module.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_post_hook(_do_not_miss_frozen)  # type: ignore[no-untyped-call]


def _build_model(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if getattr(module, "model", None) is None and any(name.startswith(f"{prefix}model.") for name in state_dict):
        module.model = module.builder.build(Precision.of(getattr(module._trainer, "precision", None)))
        module.initial_weights = None


def trained_names(module: nn.Module) -> set[str]:
    """The names of all weights that are trained, or belong to adapters; of one that is shared, each."""
    named = module.named_parameters(remove_duplicate=False)
    trained = {name for name, weight in named if weight.requires_grad}
    for prefix, each in module.named_modules():
        trained |= {f"{prefix}.{name}".lstrip(".") for name in adapter_names(each)}
    return trained


def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    kept = {prefix + name for name in trained_names(module)}
    for key in [key for key in state_dict if key.startswith(f"{prefix}model.") and key not in kept]:
        del state_dict[key]


def _do_not_miss_frozen(module: nn.Module, keys: _IncompatibleKeys) -> None:
    trained = trained_names(module)
    keys.missing_keys[:] = [key for key in keys.missing_keys if key.removeprefix("module.") in trained]
