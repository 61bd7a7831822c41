"""Memory that is kept from one optimizer step to the next: parameters, gradients and the optimizer's state."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def binary(size: float) -> str:
    """A size in bytes as text, such as `1.5 GiB`."""
    power = min(max(int(size).bit_length() - 1, 0) // 10, 3)
    return f"{size / 2 ** (10 * power):,.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"


def parameter_counts(parameters: Iterable[Tensor]) -> str:
    """The number of parameters over all devices, and of those that are trained, as text."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    of_these = "all of them trained" if trained == total else f"{trained:,} ({trained / total:.2%}) of them trained"
    return f"{total:,} parameters, {of_these}"


@rank_zero_only
def announce_state(parameters: Sequence[nn.Parameter], factory: OptimizerFactory) -> None:
    """Say how many parameters there are to train, and what is kept of them."""
    rank_zero_info(f"{parameter_counts(parameters)}; {state_memory(parameters, factory)}.")


@dataclass(frozen=True)
class StateMemory:
    """Bytes that one device keeps from one optimizer step to the next.

    Attributes:
        weights: Of all parameters, also frozen ones.
        gradients: Of the parameters that are trained.
        optimizer: Of the optimizer's state; None if it cannot be found out without values.
    """

    weights: int
    gradients: int
    optimizer: int | None

    @property
    def total(self) -> int:
        """All of it, as far as it is known."""
        return self.weights + self.gradients + (self.optimizer or 0)

    def shard(self, num_shards: int) -> "StateMemory":
        """What each of so many devices keeps, if the model is sharded over them."""
        optimizer = None if self.optimizer is None else -(-self.optimizer // num_shards)
        return StateMemory(-(-self.weights // num_shards), -(-self.gradients // num_shards), optimizer)

    def __str__(self) -> str:
        what = "weights and gradients" if self.optimizer is None else "weights, gradients and optimizer"
        return f"{what}: {binary(self.total)} on each device"


def state_memory(parameters: Iterable[Tensor], optimizer: OptimizerFactory) -> StateMemory:
    """What weights, gradients and optimizer state take; of sharded weights, this process's shards.

    The optimizer takes a step on one parameter of each shape, without values.
    """
    weights, trained = 0, Counter[tuple[torch.Size, torch.dtype]]()
    for parameter in parameters:
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        weights += storage_size(local)
        trained[local.shape, local.dtype] += parameter.requires_grad
    trained = +trained
    with FakeTensorMode(allow_non_fake_inputs=True):
        tried = {nn.Parameter(torch.empty(shape, dtype=dtype)): count for (shape, dtype), count in trained.items()}
        for parameter in tried:
            parameter.grad = torch.empty_like(parameter)
    gradients = sum(storage_size(parameter) * count for parameter, count in tried.items())
    try:
        (made := optimizer(tried)).step()
    except Exception:  # noqa: BLE001 (whatever an optimizer raises that reads values)
        return StateMemory(weights, gradients, None)
    states = {parameter: sum(map(storage_size, state_tensors(made.state.get(parameter, {})))) for parameter in tried}
    return StateMemory(weights, gradients, sum(states[parameter] * count for parameter, count in tried.items()))


def storage_size(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def state_tensors(state: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of what an optimizer remembers of a parameter."""
    return [value for value in state.values() if isinstance(value, Tensor)]
