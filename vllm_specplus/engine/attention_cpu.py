"""Tree attention over vLLM's attention backend for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from specplus_kernels import cpu_library

from vllm_specplus.engine.attention import KVViews, TreeRowsMixin
from vllm_specplus.engine.compat import init_logger
from vllm_specplus.engine.compat_cpu import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

logger = init_logger(__name__)
_VEC_LAYOUTS = ("vec", "vec16")
_TILE = 16


def kv_views(layer: Any) -> KVViews:
    """Of a layer's cache, in the layout that its metadata builder has chosen."""
    return amx_kv_views(layer.kv_cache) if layer.isa == "amx" else vec_kv_views(layer.kv_cache)


def vec_kv_views(kv_cache: torch.Tensor) -> KVViews:
    """Of a "vec" cache of a CPU.

    Memory is [num_blocks, num_kv_heads, block_size, 2 * head_size]; the first half of each
    (block, head) holds the keys transposed, [head_size, block_size], the second half the values.
    """
    block_size, width = kv_cache.shape[2:]
    keys, values = _halves(kv_cache)
    keys = keys.unflatten(-1, (width // 2, block_size)).permute(0, 3, 1, 2)
    values = values.unflatten(-1, (block_size, width // 2)).transpose(1, 2)
    return keys, values


def amx_kv_views(kv_cache: torch.Tensor) -> KVViews:
    """Of an "amx" cache in bf16, in tiles.

    As "vec" but for the halves: keys are [block_size / 16, head_size / 2, 16 slots, 2 dimensions],
    values [head_size / 16, block_size / 2, 16 dimensions, 2 slots].
    """
    block_size, width = kv_cache.shape[2:]
    keys, values = _halves(kv_cache)
    keys = keys.unflatten(-1, (block_size // _TILE, width // 4, _TILE, 2))
    values = values.unflatten(-1, (width // 2 // _TILE, block_size // 2, _TILE, 2))
    return keys.permute(0, 2, 4, 1, 3, 5), values.permute(0, 3, 5, 1, 2, 4)


def _halves(kv_cache: torch.Tensor) -> KVViews:
    """[num_blocks, num_kv_heads, block_size * head_size] each."""
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * width // 2)
    return halves[:, :, 0], halves[:, :, 1]


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend plus tree rows."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUAttentionMetadataBuilder]:
        return TreeCPUAttentionMetadataBuilder


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Keeps the cache in a layout that tree attention reads: "vec", or where vLLM chose it and our
    C++ kernels are there "amx", whose prompts take a fifth of the time."""

    isa: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_bf16 = self.dtype == torch.bfloat16 and self.kv_cache_dtype in ("auto", "bfloat16")
        if self.isa == "amx" and is_bf16 and cpu_library.load() is not None:
            return
        if self.isa not in _VEC_LAYOUTS:
            logger.warning_once(
                "KV cache layout '%s' was selected; token trees use 'vec' instead.", self.isa
            )
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)


class TreeCPUAttentionImpl(TreeRowsMixin, CPUAttentionBackendImpl):
    """vLLM's CPU attention plus tree rows."""

    kv_views = staticmethod(kv_views)
