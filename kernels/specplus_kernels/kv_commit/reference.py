"""kv_commit in plain torch: gather all rows of a cache, then scatter them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def kv_commit(
    caches: Sequence[torch.Tensor], src_slots: torch.Tensor, dst_slots: torch.Tensor
) -> None:
    """See the package's docstring."""
    real = (src_slots >= 0) & (dst_slots >= 0)
    src, dst = src_slots[real], dst_slots[real]
    for cache in caches:
        cache[_at(cache, dst)] = cache[_at(cache, src)]


def _at(cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The indices of the slots in the cache's first dimensions."""
    at: tuple[torch.Tensor, ...] = ()
    for size in reversed(cache.shape[1 : cache.dim() // 2]):
        slots, at = slots // size, (slots % size, *at)
    return slots, *at
