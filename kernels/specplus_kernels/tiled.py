"""KV caches in tiles, as matrix units read them.

Where neighbouring slots or dimensions lie interleaved, no strides make a cache
[num_blocks, block_size, num_kv_heads, head_size]. It is given as
[num_blocks, slot_tiles, slots, num_kv_heads, dim_tiles, dims] then, of any strides.
"""

from __future__ import annotations

import torch


def plain_shape(cache: torch.Tensor) -> tuple[int, ...]:
    """Of a cache in tiles or not, [num_blocks, block_size, num_kv_heads, head_size]."""
    if cache.dim() != 6:
        return tuple(cache.shape)
    num_blocks, slot_tiles, slots, num_kv_heads, dim_tiles, dims = cache.shape
    return num_blocks, slot_tiles * slots, num_kv_heads, dim_tiles * dims


def plain(cache: torch.Tensor) -> torch.Tensor:
    """A cache of `plain_shape`; a copy of one in tiles."""
    return cache.flatten(4).flatten(1, 2) if cache.dim() == 6 else cache
