"""Tree attention over vLLM's attention backends.

A backend's subclass delegates everything but tree rows. A step with branching trees
attaches `TreeRows` to the attention metadata; rows of such trees see the committed context and
their ancestors, all others are causal and stay with vLLM's kernel. Nothing else of the metadata is
read, which every backend has its own of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from specplus_kernels.tiled import KVViews
from specplus_kernels.tree_attention import tree_attention

from vllm_specplus.engine.compat import (
    AttentionBackendEnum,
    AttentionCGSupport,
    resolve_obj_by_qualname,
)
from vllm_specplus.round import Staged


@dataclass(frozen=True, slots=True)
class TreeRows:
    """A batch for tree attention.

    block_table: int32 [num_reqs, max_blocks], of the layer's KV group. query_start_loc: int32
    [num_reqs + 1]. requests: int32 [num_trees], the requests to serve, None for all. covers_all:
    there are no others, so causal attention need not run. ancestor_mask: int64 [rows, words].
    positions: int64 [rows]. context_lens: int32 [num_reqs], KV slots before each request's rows.
    max_query_len: no tree has more rows, None: no more than the mask's words allow.
    """

    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    requests: torch.Tensor | None
    covers_all: bool
    ancestor_mask: torch.Tensor
    positions: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int | None = None


def attach_tree(
    metadata: Iterable[Any], staged: Staged, positions: torch.Tensor, context_lens: torch.Tensor
) -> None:
    """Marks the step's attention metadata (one object per KV group and kind) as a tree step.

    positions: int64 [rows]; context_lens: int32 [num_reqs].
    """
    requests = staged.is_tree.nonzero().flatten().int()
    ancestor_mask = staged.row_masks(len(positions))
    for group in metadata:
        group.tree = TreeRows(
            block_table=group.block_table,
            query_start_loc=group.query_start_loc,
            requests=requests,
            covers_all=len(requests) == len(staged.is_tree),
            ancestor_mask=ancestor_mask,
            positions=positions,
            context_lens=context_lens,
        )


def packed_kv_views(layer: Any) -> KVViews:
    """Of a layer's cache on a GPU: [num_blocks, num_kv_heads, block_size, 2 * head_size], keys
    first."""
    keys, values = layer.kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


class TreeRowsMixin:
    """Over an attention implementation of vLLM: causal attention by vLLM, tree rows by ours."""

    kv_views: Callable[[Any], KVViews]
    num_heads: int
    head_size: int
    scale: float
    logits_soft_cap: float | None
    sinks: torch.Tensor | None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Tree rows are written unquantized."""
        return False

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        tree: TreeRows | None = getattr(attn_metadata, "tree", None)
        if tree is None or not tree.covers_all:
            super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        if tree is not None:
            num_rows = len(tree.positions)
            keys, values = self.kv_views(layer)
            tree_attention(
                query[:num_rows],
                keys,
                values,
                tree.block_table,
                tree.query_start_loc,
                tree.context_lens,
                tree.ancestor_mask,
                tree.positions,
                scale=self.scale,
                sliding_window=layer.sliding_window,
                logits_soft_cap=self.logits_soft_cap or 0.0,
                sinks=self.sinks,
                out=output[:num_rows].view(num_rows, self.num_heads, self.head_size),
                requests=tree.requests,
                max_query_len=tree.max_query_len,
            )
        return output


class TreeGraphsMixin:
    """Over a metadata builder of vLLM: graphs of trees serve batches of equal trees only."""

    @classmethod
    def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
        own = super().get_cudagraph_support(*args)  # type: ignore[misc]
        return min(own, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)


GPU_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
"""vLLM's attention backends for GPUs whose cache is `packed_kv_views`'."""


def gpu_backends() -> dict[AttentionBackendEnum, type]:
    """What takes the place of which backend of vLLM."""
    backends = {AttentionBackendEnum[name]: gpu_backend(name) for name in GPU_BACKENDS}
    return {kind: backend for kind, backend in backends.items() if backend is not None}


@cache
def gpu_backend(name: str) -> type | None:
    """A backend of vLLM plus tree rows, or None where vLLM could not use it either."""
    try:
        backend = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    except ImportError:
        return None
    impl_bases = (TreeRowsMixin, backend.get_impl_cls())
    impl = type("TreeImpl", impl_bases, {"kv_views": staticmethod(packed_kv_views)})
    builder = type("TreeBuilder", (TreeGraphsMixin, backend.get_builder_cls()), {})
    methods = {"get_impl_cls": lambda: impl, "get_builder_cls": lambda: builder}
    tree = type(f"Tree_{name}", (backend,), {n: staticmethod(m) for n, m in methods.items()})
    globals()[tree.__name__] = tree  # where vLLM looks it up
    tree.__module__ = __name__
    return tree
