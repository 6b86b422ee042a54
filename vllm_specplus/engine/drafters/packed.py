"""Layers of drafts on the CPU engine, in the form that takes the least time for a few rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_specplus.engine.compat import VocabParallelEmbedding
from vllm_specplus.engine.compat_cpu import dispatch_cpu_unquantized_gemm, rms_norm
from vllm_specplus.proposers.heads.int8 import Int8Linear, drafting_dtype
from vllm_specplus.proposers.heads.mtp import RMSNorm


def packed_linear(
    weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> nn.Module:
    """x @ weight.T + bias for a model of `dtype`, in int8 or in the layout that vLLM's own linear
    layers have."""
    if drafting_dtype(dtype) != dtype:
        return Int8Linear(weight, bias)
    return PackedLinear(weight.to(dtype), None if bias is None else bias.to(dtype))


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


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Puts such layers in the place of a module's linear layers and norms, for a model of `dtype`:
    from the module's own weights, best those of its file."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, packed_linear(layer.weight, dtype, layer.bias))
            elif isinstance(layer, RMSNorm):
                setattr(parent, name, FusedRMSNorm(layer, drafting_dtype(dtype)))


def gathered_rows(layer: Any, token_ids: torch.Tensor, copy: bool) -> torch.Tensor:
    """Rows of an embedding or of a head, [num_tokens, hidden_size], gathered from all ranks."""
    if layer.tp_size == 1 and not copy:
        return layer.weight[: len(token_ids)]
    return VocabParallelEmbedding.forward(layer, token_ids)
