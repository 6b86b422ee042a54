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
        block_size = cache.shape[1]
        rows = cache[src // block_size, src % block_size]
        cache[dst // block_size, dst % block_size] = rows
