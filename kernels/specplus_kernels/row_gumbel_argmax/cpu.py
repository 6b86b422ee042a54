"""Launcher of cpu.cpp."""

from __future__ import annotations

import torch

from specplus_kernels.cpu_library import DTYPES, Kernel
from specplus_kernels.row_argmax.cpu import refuses

__all__ = ["refuses", "row_gumbel_argmax"]

_kernel = Kernel("specplus_row_gumbel_argmax", "8q")


def row_gumbel_argmax(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor
) -> torch.Tensor:
    """As the reference; `refuses` said None."""
    num_rows, vocab_size = logits.shape
    temperature, seeds = temperature.contiguous(), seeds.contiguous()
    out = torch.empty(num_rows, dtype=torch.int64)
    _kernel(
        logits.data_ptr(),
        temperature.data_ptr(),
        seeds.data_ptr(),
        out.data_ptr(),
        num_rows,
        vocab_size,
        logits.stride(0),
        DTYPES[logits.dtype],
    )
    return out
