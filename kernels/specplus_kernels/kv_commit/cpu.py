"""Launcher of cpu.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplus_kernels.cpu_library import Kernel
from specplus_kernels.tiled import is_tiled, plain_shape

_kernel = Kernel("specplus_kv_commit", "7q")


def refuses(caches: Sequence[torch.Tensor]) -> str | None:
    """What the kernel does not take of these caches, None if it takes them."""
    sizes = {cache.element_size() for cache in caches} - {1, 2, 4, 8}
    return f"elements of {sizes} bytes" if sizes else None


def describe(caches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Address, sizes and strides, and element size of every cache, [num_caches, 14] int64: those
    of all dimensions of a cache in tiles, which one that is not has one of."""
    rows = []
    for cache in caches:
        tiled = cache if is_tiled(cache) else cache.unsqueeze(3).unsqueeze(1)
        rows.append((cache.data_ptr(), *tiled.shape, *tiled.stride(), cache.element_size()))
    return torch.tensor(rows, dtype=torch.int64)


def kv_commit(
    described: torch.Tensor,
    caches: Sequence[torch.Tensor],
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
) -> None:
    """As the reference; `refuses` said None."""
    src_slots, dst_slots = src_slots.contiguous(), dst_slots.contiguous()
    num_blocks, block_size = plain_shape(caches[0])[:2]
    if _kernel(
        described.data_ptr(),
        len(described),
        block_size,
        num_blocks,
        src_slots.data_ptr(),
        dst_slots.data_ptr(),
        len(src_slots),
    ):
        raise ValueError(f"a slot is not in the cache of {num_blocks * block_size} slots")
