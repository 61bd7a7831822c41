"""Functions of a tile compiled by torch, and how often torch may compile the same code anew."""

import inspect
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., object])

# How often code may be compiled anew: with and without gradients, for few and many rows, for each model of a process.
# Older versions of torch have no such argument, and give up after 8 times.
RECOMPILE_LIMIT: dict[str, Any] = {}
if "recompile_limit" in inspect.signature(torch.compile).parameters:
    RECOMPILE_LIMIT["recompile_limit"] = 64


@cache
def fused(function: _Function) -> _Function:
    """A function of a tile compiled to few passes over it, or as it is where there is no compiler.

    Args:
        function: Its first argument is the tile, `(rows, width)`. The number of rows may vary from call to call; for
            each width there is code of its own, which on an H100 was four times as fast as code for any width.
    """
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        warnings.warn("There is no C compiler, which `torch.compile` needs, so the head is slower.", stacklevel=2)
        return function
    # With few rows the compiler divides a row between several threads and says so, at great length.
    warnings.filterwarnings("ignore", r"\s*Online softmax is disabled on the fly")
    compiled = torch.compile(function, dynamic=True, **RECOMPILE_LIMIT)

    @wraps(function)
    def of_tile(tile: Tensor, *arguments: Any) -> object:
        torch._dynamo.mark_static(tile, 1)
        return compiled(tile, *arguments)

    return cast(_Function, of_tile)
