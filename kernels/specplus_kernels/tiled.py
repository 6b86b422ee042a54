"""KV caches in tiles, as matrix units read them.

Where neighbouring slots or dimensions lie interleaved, no strides make a cache
[num_blocks, block_size, num_kv_heads, head_size]. It is given as
[num_blocks, slot_tiles, slots, num_kv_heads, dim_tiles, dims] then, of any strides.
"""

from __future__ import annotations

import torch

_TILE = 16
KVViews = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a cache."""


def is_tiled(cache: torch.Tensor) -> bool:
    """Whether a cache is given in tiles."""
    return cache.dim() == 6


def plain_shape(cache: torch.Tensor) -> tuple[int, ...]:
    """Of a cache in tiles or not, [num_blocks, block_size, num_kv_heads, head_size]."""
    if not is_tiled(cache):
        return tuple(cache.shape)
    num_blocks, slot_tiles, slots, num_kv_heads, dim_tiles, dims = cache.shape
    return num_blocks, slot_tiles * slots, num_kv_heads, dim_tiles * dims


def plain(cache: torch.Tensor) -> torch.Tensor:
    """A cache of `plain_shape`; a copy of one in tiles."""
    return cache.flatten(4).flatten(1, 2) if is_tiled(cache) else cache


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
