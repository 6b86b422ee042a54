"""Tree attention over vLLM's attention backend for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from specplus_kernels import cpu_library
from specplus_kernels.tiled import KVViews, amx_kv_views, vec_kv_views

from vllm_specplus.engine.attention import TreeRowsMixin
from vllm_specplus.engine.compat import init_logger
from vllm_specplus.engine.compat_cpu import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

logger = init_logger(__name__)
_VEC_LAYOUTS = ("vec", "vec16")


def kv_views(layer: Any) -> KVViews:
    """Of a layer's cache, in the layout that its metadata builder has chosen."""
    return amx_kv_views(layer.kv_cache) if layer.isa == "amx" else vec_kv_views(layer.kv_cache)


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
    C++ kernels are there "amx", whose prompts take a quarter of the time."""

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
