"""`Schedule`: the learning rate over a run's optimizer steps."""

import math
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_sft.checks import check_number, check_type
from lightning_sft.errors import SettingsError, one_line

_WITHOUT_LENGTH = ("constant", "constant_with_warmup")


@dataclass(frozen=True)
class Schedule:
    """A schedule of `transformers`.

    Attributes:
        name: That `transformers` gives it, such as `cosine`.
        warmup_steps: Optimizer steps over which the learning rate rises; below 1: a fraction of the run.
        kwargs: Further arguments of the schedule.

    Raises:
        SettingsError: If `warmup_steps` is neither, or `kwargs` is no mapping.
    """

    name: str = "cosine"
    warmup_steps: float = 0.03
    kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_number(
            "warmup_steps",
            self.warmup_steps,
            "a number of steps or a fraction below 1",
            lambda steps: steps >= 0 and (steps <= 1 or steps % 1 == 0),
        )
        check_type("lr_scheduler_kwargs", self.kwargs, dict, "a mapping of arguments", optional=True)

    def build(self, optimizer: Optimizer, num_steps: int) -> LRScheduler:
        """The scheduler of an optimizer, stepped once after each optimizer step.

        Args:
            optimizer: Whose learning rates it sets.
            num_steps: Optimizer steps of the run; -1 if it has no length.

        Raises:
            SettingsError: If there is no such schedule, or it needs what is not there.
        """
        from transformers import get_scheduler  # imports `peft` and bitsandbytes, whose optimizers share torch's names

        if num_steps < 0 and (self.name not in _WITHOUT_LENGTH or 0 < self.warmup_steps < 1):
            raise SettingsError(
                f"`lr_scheduler` is {self.name!r} with `warmup_steps` = {self.warmup_steps}, but the run has no "
                "length. Set `max_steps` or `max_epochs`, or choose `constant` or `constant_with_warmup` with a "
                "number of steps."
            )
        if self.name == "reduce_lr_on_plateau":
            raise SettingsError(
                "`lr_scheduler` is 'reduce_lr_on_plateau', which follows a metric, not the optimizer steps."
            )
        is_fraction = self.warmup_steps < 1
        num_warmup_steps = math.ceil(self.warmup_steps * num_steps) if is_fraction else int(self.warmup_steps)
        try:
            scheduler: LRScheduler = get_scheduler(
                self.name, optimizer, num_warmup_steps, max(num_steps, 1), self.kwargs
            )
        except (ValueError, TypeError) as error:
            with_kwargs = f" with `lr_scheduler_kwargs` = {self.kwargs}" if self.kwargs else ""
            raise SettingsError(f"`lr_scheduler` is {self.name!r}{with_kwargs}: {one_line(error)}") from None
        return scheduler
