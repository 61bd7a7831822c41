"""Whether a run continues on the data that it began with."""

from collections.abc import Mapping
from typing import Any

from lightning_sft.errors import SettingsError


def check_same_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue if what the run's order of rows depends on is another now than it was in the checkpoint."""
    for name in dict.fromkeys(["streaming", *now, *saved]):
        then, today = saved.get(name, False), now.get(name, False)
        if then == today:
            continue
        difference, use = f"`{name}` = {then}, now it is {today}", then
        if name == "rows":
            difference, use = "other training rows or tokens", "those"
        elif name == "weights":
            difference, use = "other weights of the sources in `train_data`", "those"
        raise SettingsError(
            f"The checkpoint was made with {difference}: the run cannot continue at the same place in the data. "
            f"Use {use}, or begin a new run with its weights (`--init_from`)."
        )
