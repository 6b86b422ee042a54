"""Compiles Triton kernels for GPUs on a machine without one, through their own launchers.

Inside `compiling(capability)` a launcher that is called with tensors on the meta device compiles
what it would launch, specialised as it would be, and launches nothing. Run this in a process
without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from specplus_kernels import dispatch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WARP_SIZE = 32
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes; bytes, but for the registers per thread and the warps."""

    kernel: str
    capability: int
    num_warps: int
    registers: int
    stack: int
    local: int
    shared: int


class _OfflineDriver:
    """As much of Triton's driver as compiling asks for. The capability serves as device number."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, WARP_SIZE)

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def compiling(capability: int) -> Iterator[list[Resources]]:
    """Yields a list that grows by the resources of every kernel that a launcher would launch.

    Args:
        capability: 80, 90 or 100 for sm_80, sm_90 or sm_100.

    """
    found: list[Resources] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        usage = _usage(kernel.asm["cubin"])
        found.append(
            Resources(
                kernel=self.fn.__name__,
                capability=capability,
                num_warps=kernel.metadata.num_warps,
                registers=usage["REG"],
                stack=usage["STACK"],
                local=usage["LOCAL"],
                shared=kernel.metadata.shared,
            )
        )
        return kernel

    before, driver._active = driver._active, _OfflineDriver(capability)
    JITFunction.run = compile_only
    try:
        with torch.device("meta"), dispatch.force("triton"):
            yield found
    finally:
        JITFunction.run = run
        driver._active = before


@cache
def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and so on, as cuobjdump counts them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
