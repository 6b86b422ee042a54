"""Layers of drafts on the CPU engine, in the form that takes the least time for a few rows.

A level is a pass over few rows, so it takes as long as its weights are long. Drafts only propose:
int8 rows change which tokens they are, never the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from specplus_kernels import Int8Weight, int8_linear
from specplus_kernels.int8_linear import cpu as int8_kernel
from torch import nn

from vllm_specplus.engine.compat import VocabParallelEmbedding
from vllm_specplus.engine.compat_cpu import dispatch_cpu_unquantized_gemm, rms_norm
from vllm_specplus.proposers.heads.mtp import RMSNorm


def drafting_dtype(dtype: torch.dtype) -> torch.dtype:
    """What drafts of a model of `dtype` compute in: float32 around int8 matrices, where a model of
    16 bits runs on a CPU that has a kernel for them."""
    return torch.float32 if dtype.itemsize == 2 and int8_kernel.is_built() else dtype


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """x @ weight.T + bias, in int8 or in the layout that vLLM's own linear layers have."""
    int8 = drafting_dtype(weight.dtype) != weight.dtype
    return Int8Linear(weight, bias) if int8 else PackedLinear(weight, bias)


class Int8Linear(nn.Module):
    """x @ weight.T + bias in float32, with the weight in int8."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self._weight, self._bias = Int8Weight.of(weight), None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, in_features]."""
        out = int8_linear(x, self._weight)
        return out if self._bias is None else out + self._bias


class PackedLinear(nn.Module):
    """x @ weight.T + bias, with the weight in the layout that vLLM's own linear layers have."""

    cpu_linear: Callable[..., torch.Tensor]

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, in_features]."""
        return self.cpu_linear(x, self.weight, self.bias)


class FusedRMSNorm(nn.Module):
    """A RMSNorm of heads in one operation of vLLM's, in the dtype of what it is given."""

    def __init__(self, norm: RMSNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self._gain, self._eps = (norm.weight.float() + norm.offset).to(dtype), norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size]."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rms_norm(out, x.contiguous(), self._gain, self._eps)
        return out


def pack(module: nn.Module) -> None:
    """Puts such layers in the place of a module's linear layers and norms."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, packed_linear(layer.weight, layer.bias))
            elif isinstance(layer, RMSNorm):
                norm = FusedRMSNorm(layer, drafting_dtype(layer.weight.dtype))
                setattr(parent, name, norm)


def gathered_rows(layer: Any, token_ids: torch.Tensor, copy: bool) -> torch.Tensor:
    """Rows of an embedding or of a head, [num_tokens, hidden_size], gathered from all ranks."""
    if layer.tp_size == 1 and not copy:
        return layer.weight[: len(token_ids)]
    return VocabParallelEmbedding.forward(layer, token_ids)
