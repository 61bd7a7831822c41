"""`ActivationCheckpointing`: activations that are computed again in backward rather than kept."""

import inspect
import re
from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_sft.checks import check_type
from lightning_sft.errors import SettingsError


@dataclass(frozen=True)
class ActivationCheckpointing:
    """Which blocks of a model keep their input alone, and where.

    Args:
        gradient_checkpointing: True: every block; a number `n`: each `n`-th. False: none, all activations are kept.
        activation_offloading: Keep these inputs in main memory.
    """

    gradient_checkpointing: bool | int = False
    activation_offloading: bool = False

    def __post_init__(self) -> None:
        every = self.gradient_checkpointing
        check_type("gradient_checkpointing", every, int, "a number, or true or false")
        if every is not False and every < 1:
            raise SettingsError(
                f"`gradient_checkpointing` is {every}, expected true, false, or a number from 1 for every n-th block."
            )
        check_type("activation_offloading", self.activation_offloading, bool, "true or false")
        if self.activation_offloading and not every:
            raise SettingsError(
                "`activation_offloading` keeps the inputs of blocks under `gradient_checkpointing` in CPU memory, but "
                "that is false. Set it to true as well."
            )

    def enable(self, model: PreTrainedModel) -> None:
        """Switch it on in a model, in place; refused if the model, or this version of `transformers`, cannot."""
        if not self.gradient_checkpointing:
            return
        new_name = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23 renamed it
        enable = new_name or model.gradient_checkpointing_enable
        if self.activation_offloading and "offload" not in inspect.signature(enable).parameters:
            raise SettingsError(
                "`activation_offloading` needs `transformers` 5.24 or later. Set it to false, or update that."
            )
        try:
            enable({"use_reentrant": False}, **({"offload": True} if self.activation_offloading else {}))
        except ValueError as error:
            raise SettingsError(f"`gradient_checkpointing` does not work with this model: {error}") from error
        if self.gradient_checkpointing > 1:
            self._keep_others(model)

    def _keep_others(self, model: PreTrainedModel) -> None:
        named = [(name, each) for name, each in model.named_modules() if isinstance(each, GradientCheckpointingLayer)]
        if not named:
            raise SettingsError(
                f"`gradient_checkpointing` is {self.gradient_checkpointing}, but {type(model).__name__} does not say "
                "what its blocks are. Set it to true."
            )
        num_before: Counter[str] = Counter()
        for name, block in named:
            stack = re.split(r"\.\d+(?:\.|$)", name)[0]  # counted by itself: a model of images has one for them as well
            block.gradient_checkpointing = num_before[stack] % self.gradient_checkpointing == 0
            num_before[stack] += 1
