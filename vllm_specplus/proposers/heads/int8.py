"""Linear layers of drafts in int8, on CPUs.

A level is a pass over few rows, so it takes as long as its weights are long. Drafts only propose:
int8 rows change which tokens they are, never the text.
"""

from __future__ import annotations

import torch
from specplus_kernels import Int8Weight, int8_linear
from specplus_kernels.int8_linear import cpu as kernel
from torch import nn


def drafting_dtype(dtype: torch.dtype) -> torch.dtype:
    """What drafts of a model of `dtype` compute in: float32 around int8 matrices, where a model of
    16 bits runs on a CPU that has a kernel for them."""
    return torch.float32 if dtype.itemsize == 2 and kernel.is_built() else dtype


class Int8Linear(nn.Module):
    """x @ weight.T + bias in float32, with the weight in int8."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._weight, self._bias = Int8Weight.of(weight), None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, in_features]."""
        out = int8_linear(x, self._weight)
        return out if self._bias is None else out + self._bias
