"""Tree attention over vLLM's attention backends.

A backend's subclass delegates everything but tree rows. A step with branching trees
attaches `TreeRows` to the attention metadata; rows of such trees see the committed context and
their ancestors, all others are causal and stay with vLLM's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from specplus_kernels.tree_attention import tree_attention

from vllm_specplus.engine.compat import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    init_logger,
)
from vllm_specplus.engine.round import Staged

logger = init_logger(__name__)
_VEC_LAYOUTS = ("vec", "vec16")


@dataclass(frozen=True, slots=True)
class TreeRows:
    """What tree attention needs beside the host's metadata.

    requests: int32 [num_trees], the requests to serve, None for all. covers_all: there are no
    others, so causal attention need not run. ancestor_mask: int64 [rows, words]. positions: int64
    [rows]. context_lens: int32 [num_reqs], KV slots before each request's rows.
    """

    requests: torch.Tensor | None
    covers_all: bool
    ancestor_mask: torch.Tensor
    positions: torch.Tensor
    context_lens: torch.Tensor


def attach_tree(
    metadata: Iterable[Any], staged: Staged, positions: torch.Tensor, context_lens: torch.Tensor
) -> None:
    """Marks the step's attention metadata (one object per KV group and kind) as a tree step.

    positions: int64 [rows]; context_lens: int32 [num_reqs].
    """
    requests = staged.is_tree.nonzero().flatten().int()
    rows = TreeRows(
        requests=requests,
        covers_all=len(requests) == len(staged.is_tree),
        ancestor_mask=staged.row_masks(len(positions)),
        positions=positions,
        context_lens=context_lens,
    )
    for group in metadata:
        group.tree = rows


def kv_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value views [num_blocks, block_size, num_kv_heads, head_size] of a "vec" cache.

    Memory is [num_blocks, num_kv_heads, block_size, 2 * head_size]; the first half of each
    (block, head) holds the keys transposed, [head_size, block_size], the second half the values.
    """
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * width // 2)
    keys = halves[:, :, 0].unflatten(-1, (width // 2, block_size)).permute(0, 3, 1, 2)
    values = halves[:, :, 1].unflatten(-1, (block_size, width // 2)).transpose(1, 2)
    return keys, values


class TreeRowsMixin:
    """Over an attention implementation of vLLM: causal attention by vLLM, tree rows by ours."""

    kv_views: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    num_heads: int
    head_size: int
    scale: float
    sliding_window: Any
    logits_soft_cap: float
    sinks: torch.Tensor | None

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
            num_rows = attn_metadata.num_actual_tokens
            keys, values = type(self).kv_views(kv_cache)
            tree_attention(
                query[:num_rows],
                keys,
                values,
                attn_metadata.block_table,
                attn_metadata.query_start_loc,
                tree.context_lens,
                tree.ancestor_mask[:num_rows],
                tree.positions[:num_rows],
                scale=self.scale,
                sliding_window=layer.sliding_window,
                logits_soft_cap=self.logits_soft_cap,
                sinks=self.sinks,
                out=output[:num_rows].view(num_rows, self.num_heads, self.head_size),
                requests=tree.requests,
            )
        return output


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

    kv_views = staticmethod(kv_views)
