"""`HostCopy`: a number that is computed on a device, read without holding the device up."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in main memory, ordered now and read later.

    Ordering it does not wait for the device. `read` waits until the tensor has been computed and copied, but not for
    the work that the device was given after the copy was ordered.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # from CUDA: to pinned memory
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """The tensor, in main memory."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
