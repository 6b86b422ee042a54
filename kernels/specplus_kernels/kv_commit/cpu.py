"""Launcher of cpu.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplus_kernels.cpu_library import Kernel

_kernel = Kernel("specplus_kv_commit", "7q")


def refuses(caches: Sequence[torch.Tensor]) -> str | None:
    """What the kernel does not take of these caches, None if it takes them."""
    sizes = {cache.element_size() for cache in caches} - {1, 2, 4, 8}
    return f"elements of {sizes} bytes" if sizes else None


def describe(caches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Address, strides, heads, head size and element size of every cache, [num_caches, 8] int64."""
    rows = [
        (cache.data_ptr(), *cache.stride(), *cache.shape[2:], cache.element_size())
        for cache in caches
    ]
    return torch.tensor(rows, dtype=torch.int64)


def kv_commit(
    described: torch.Tensor,
    caches: Sequence[torch.Tensor],
    src_slots: torch.Tensor,
    dst_slots: torch.Tensor,
) -> None:
    """As the reference; `refuses` said None."""
    src_slots, dst_slots = src_slots.contiguous(), dst_slots.contiguous()
    num_blocks, block_size = caches[0].shape[:2]
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
