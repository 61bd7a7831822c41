"""Compile what `torch.compile` makes of the head's tiles for CUDA, on a machine without a device.

    pip install triton==3.6.0 && python tests/benchmarks/cuda_kernels.py

Inductor is told of a device that is not there and writes its Triton kernels; Triton makes machine code of them for
several devices (`ptxas` comes with it). Nothing runs: that they are right is shown by the same function compiled for
the CPU (`tests/model/test_head.py`). The device is pretended to inside torch 2.13 and triton 3.6; other versions may
ask for more of it.
"""

import argparse
import importlib.util
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import measure
import torch
import torch._inductor.config
import torch._inductor.decomposition
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_sft.model.tiles import LogitTransform, score_tile

DEVICES = {"sm_80": 80, "sm_90": 90}
_PROPERTIES = {
    "name": "pretended", "multi_processor_count": 132, "total_memory": 80 * 2**30, "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "warp_size": 32,
    "L2_cache_size": 50 * 2**20,
    "shared_memory_per_block": 48 * 2**10, "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_multiprocessor": 228 * 2**10, "gcnArchName": "",
}  # fmt: skip


class Driver:
    """Triton's, of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 2**10})

    def get_current_target(self) -> Any:
        """What to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The same."""
        return torch.device("cuda", 0)


def pretend(capability: int) -> ExitStack:
    """A context in which torch believes in a CUDA device."""
    from triton.runtime.driver import driver

    driver.set_active(Driver(capability))
    properties = SimpleNamespace(major=capability // 10, minor=capability % 10, **_PROPERTIES)
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1, "_lazy_init": None,
        "get_device_properties": properties, "get_device_capability": divmod(capability, 10), "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "random._lazy_init": None,
        "_exchange_device": 0, "_get_device_properties": properties, "_maybe_exchange_device": 0,
        "current_stream": SimpleNamespace(cuda_stream=0),
    }  # fmt: skip
    stack = ExitStack()
    for name, answer in answers.items():
        answer_it = mock.Mock(return_value=answer)
        stack.enter_context(mock.patch(f"torch.cuda.{name}", answer_it, create=True))  # not all in a build for the CPU
    stack.enter_context(mock.patch("torch.version.cuda", "13.0"))
    stack.enter_context(mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"))
    stack.enter_context(mock.patch.object(torch._inductor.config, "compile_threads", 1))
    stack.enter_context(mock.patch.object(torch._inductor.config, "fx_graph_cache", False))
    return stack


def written_kernels(softcap: float | None) -> list[tuple[str, str]]:
    """Names and sources of the kernels that inductor writes for a tile of 4,096 rows and 16,384 tokens in bfloat16."""
    written: list[str] = []
    codegen = GraphLowering.codegen

    def keep(graph: Any) -> Any:
        result = codegen(graph)
        written.append(result[0].value)
        return result

    with FakeTensorMode() as fake:
        products = torch.empty(4096, 16384, device="cuda", dtype=torch.bfloat16)
        labels = torch.empty(4096, device="cuda", dtype=torch.long)

        def score(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(score_tile(logits, None, chosen, LogitTransform(softcap=softcap), torch.bfloat16, False))

        traced = make_fx(
            torch.func.functionalize(score),  # as `torch.compile` does
            decomposition_table=torch._inductor.decomposition.select_decomp_table(),
        )(products, labels)
        with (
            mock.patch.object(GraphLowering, "codegen", keep),
            torch._guards.tracing(torch._guards.TracingContext(fake)),
        ):
            try:
                compile_fx_inner(traced, [products, labels])
            except InductorError as error:  # what is written cannot be loaded without a device
                if not written:
                    raise RuntimeError("Inductor has written nothing.") from error
    return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", written[0], re.DOTALL)


def compiled(name: str, source: str, folder: Path) -> Any:
    """Machine code of a kernel for the device that is pretended to."""
    import triton

    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, name)
    signature, constants = dict(kernel.triton_meta["signature"]), dict(kernel.triton_meta.get("constants") or {})
    blocks = {"XBLOCK": 1 if "R0_BLOCK" in signature else 256, "R0_BLOCK": 2048}
    constants |= {block: size for block, size in blocks.items() if block in signature}
    source_of = triton.compiler.ASTSource(kernel.fn, signature | dict.fromkeys(constants, "constexpr"), constants)
    target = triton.runtime.driver.active.get_current_target()
    return triton.compile(source_of, target=target, options={"num_warps": 8})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for device, capability in DEVICES.items():
        for softcap in (None, 30.0):
            with pretend(capability), tempfile.TemporaryDirectory() as folder:
                for name, source in written_kernels(softcap):
                    binary = compiled(name, source, Path(folder))
                    passes = source.count("for r0_offset in") or 1
                    words = "soft-capped" if softcap else "plain"
                    rows.append([device, words, name, str(passes), f"{len(binary.asm['cubin']):,}"])
    print(measure.table(["device", "logits", "kernel", "passes over the tile", "bytes of machine code"], rows))


if __name__ == "__main__":
    main()
