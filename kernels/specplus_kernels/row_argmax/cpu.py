"""Launcher of cpu.cpp."""

from __future__ import annotations

import torch

from specplus_kernels.cpu_library import DTYPES, Kernel

_kernel = Kernel("specplus_row_argmax", "6q")


def refuses(logits: torch.Tensor) -> str | None:
    """What the kernel does not take of this argument, None if it takes it."""
    if logits.dtype not in DTYPES:
        return f"{logits.dtype}"
    return None if logits.stride(1) == 1 else "logits that are not contiguous in a row"


def row_argmax(logits: torch.Tensor) -> torch.Tensor:
    """As the reference; `refuses` said None."""
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64)
    dtype = DTYPES[logits.dtype]
    _kernel(logits.data_ptr(), out.data_ptr(), num_rows, vocab_size, logits.stride(0), dtype)
    return out
