"""`NoDeviceReads`: what would make the host wait for a GPU fails on the CPU, too."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# How many numbers come out depends on the values, so the host has to ask for it.
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount"}
_READS = {"_local_scalar_dense", "is_nonzero", "equal", "repeat_interleave"} | _SHAPED_BY_VALUES
_COPIES = {"cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__float__", "__int__", "__index__"}


class DeviceReadError(AssertionError):
    """The host has waited for a device."""


class NoDeviceReads:
    """Within it a read of a tensor on the device raises `DeviceReadError`.

    On the device are the tensors it is told of, and whatever is computed from them or is made there by its `device`.
    A read is what waits for values: `item`, `tolist`, `bool`, `nonzero`, boolean indexing, copies to main memory, and
    copies of numbers from there that are not pinned.
    """

    def __init__(self) -> None:
        # Storages are kept, so that no other tensor comes to lie at the same address.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._modes = (_PythonReads(self), _KernelReads(self))

    def put(self, tensors: Any) -> None:
        """Put tensors, or trees with tensors as leaves, on the device."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = storage

    def has(self, tensor: Any) -> bool:
        """Whether a tensor is on the device."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._storages

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        """A copy that may be read."""
        with _disable_current_modes():
            return tensor.detach().clone()

    def __enter__(self) -> "NoDeviceReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


class _PythonReads(TorchFunctionMode):
    """What the code asks for by name: on the CPU some of it never gets to a kernel."""

    def __init__(self, device: NoDeviceReads) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        on_device = bool(args) and self._device.has(args[0])
        # By name: torch's own code moves tensors to the device that they are on.
        targets = [target for target in (*args[1:], *kwargs.values()) if isinstance(target, str)]
        to_cpu = name == "to" and "cpu" in targets and not kwargs.get("non_blocking")
        if on_device and (name in _COPIES or to_cpu):
            raise DeviceReadError(resolve_name(func))
        if (name in ("tensor", "as_tensor") and kwargs.get("device") is not None) or (
            on_device and name == "new_tensor"
        ):
            raise DeviceReadError(f"{name} copies numbers of the host")
        result = func(*args, **kwargs)
        if kwargs.get("device") is not None and name != "to":
            self._device.put(result)
        return result


class _KernelReads(TorchDispatchMode):
    """What the kernels get, whoever has called them."""

    def __init__(self, device: NoDeviceReads) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, given = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        if any(map(self._device.has, given)):
            by_mask = name in ("index", "index_put", "index_put_") and any(
                isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1])
            )
            by_counts = name == "repeat_interleave" and kwargs.get("output_size") is not None
            if (name in _READS and not by_counts) or by_mask:
                raise DeviceReadError(str(func))
            result = func(*args, **kwargs)
            self._device.put(result)
            return result
        return func(*args, **kwargs)
