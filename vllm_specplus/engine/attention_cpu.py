"""Tree attention over vLLM's attention backend for CPUs."""

from __future__ import annotations

from typing import Any

import torch

from vllm_specplus.engine.attention import KVViews, TreeRowsMixin
from vllm_specplus.engine.compat import init_logger
from vllm_specplus.engine.compat_cpu import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

logger = init_logger(__name__)
_VEC_LAYOUTS = ("vec", "vec16")


def vec_kv_views(kv_cache: torch.Tensor) -> KVViews:
    """Of a "vec" cache of a CPU.

    Memory is [num_blocks, num_kv_heads, block_size, 2 * head_size]; the first half of each
    (block, head) holds the keys transposed, [head_size, block_size], the second half the values.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * width // 2)
    keys = halves[:, :, 0].unflatten(-1, (width // 2, block_size)).permute(0, 3, 1, 2)
    values = halves[:, :, 1].unflatten(-1, (block_size, width // 2)).transpose(1, 2)
    return keys, values


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend plus tree rows."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeCPUAttentionMetadataBuilder]:
        return TreeCPUAttentionMetadataBuilder


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Keeps the cache in a layout that tree attention reads ("vec"; AMX and others pack it)."""

    isa: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa not in _VEC_LAYOUTS:
            logger.warning_once(
                "KV cache layout '%s' was selected; token trees use 'vec' instead.", self.isa
            )
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)


class TreeCPUAttentionImpl(TreeRowsMixin, CPUAttentionBackendImpl):
    """vLLM's CPU attention plus tree rows."""

    kv_views = staticmethod(vec_kv_views)
