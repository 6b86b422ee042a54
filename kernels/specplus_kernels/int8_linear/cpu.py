"""Launcher of cpu.cpp."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from specplus_kernels import cpu_library

if TYPE_CHECKING:
    from specplus_kernels.int8_linear import Int8Weight

_NAME = "specplus_int8_linear"
_MAX_COLUMNS = 1 << 16
"""So many products of bytes cannot overflow 32 bits."""
_kernel = cpu_library.Kernel(_NAME, "8q")


@functools.cache
def is_built() -> bool:
    """Whether the library has the kernel: the CPU that it was built for has AVX512-VNNI."""
    return hasattr(cpu_library.load(), _NAME)


@functools.cache
def has_amx() -> bool:
    """Whether AMX may be used; asks the system for it."""
    granted = getattr(cpu_library.load(), f"{_NAME}_amx", None)
    return granted is not None and bool(granted())


def refuses(weight: Int8Weight) -> str | None:
    """Why the kernel does not take a weight, None if it does."""
    if not is_built():
        return "a CPU without AVX512-VNNI"
    return f"{weight.num_in} columns" if weight.num_in > _MAX_COLUMNS else None


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """As the reference; `refuses` said None."""
    x = x.float().contiguous()
    out = torch.empty(len(x), weight.num_out)
    pointers = [each.data_ptr() for each in (x, weight.panels, weight.scales, out)]
    _kernel(*pointers, len(x), weight.num_out, weight.num_in, has_amx())
    return out
