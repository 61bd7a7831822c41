"""How many bytes tensors take that exist at the same time."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the storage of each tensor that an operation returns, until it is freed.

    Some are kept from one optimizer step to the next, such as weights; those are named by `keep`. All others are
    transient.

    Attributes:
        total: Bytes that exist now.
        transient: Those of them that are not kept.
        peak: The most that `total` has been.
        transient_peak: The most that `transient` has been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.transient = self.peak = self.transient_peak = 0
        self._sizes: dict[int, int] = {}
        self._kept: set[int] = set()
        self._in_kernel = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._in_kernel:
            self._count(result)
        return result

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Count these as kept from one optimizer step to the next."""
        for tensor in tensors:
            self._count(tensor)
            key = tensor.untyped_storage()._cdata
            if key not in self._kept:
                self._kept.add(key)
                self.transient -= self._sizes[key]

    def as_one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, of which nothing but the result is counted: as a fused kernel, it makes nothing else."""

        def call(*arguments: Any) -> Any:
            self._in_kernel = True
            result = function(*arguments)
            self._in_kernel = False
            self._count(result)
            return result

        return call

    def _count(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in self._sizes:
                continue
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._free, key).atexit = False
            self.total += storage.nbytes()
            self.transient += storage.nbytes()
        self.peak = max(self.peak, self.total)
        self.transient_peak = max(self.transient_peak, self.transient)

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.total -= size
        if key in self._kept:
            self._kept.remove(key)
        else:
            self.transient -= size
