"""kv_commit: moves accepted KV rows to their contiguous slots, in every cache of a KV group.

    for each move i, in order, and each cache:  cache[dst_slots[i]] = cache[src_slots[i]]

with slot = block * block_size + offset. The move copies bits and never looks at them. A move with
a negative slot is padding and does nothing; src == dst changes nothing.

Why no move destroys what a later one reads: path node k of a request goes from tail row n_k to
tail row k with n_k >= k, and n_k ascends along the path (parents come before children). So every
later source n_j > n_k >= k lies at another logical slot than the destination k, and distinct
logical slots are distinct physical slots whatever the block table says. A destination may be the
source of an earlier move, which has been read by then. Moves of different requests touch different
slots. So doing the moves in order, or all reads before all writes, gives the same result; callers
must keep the moves of a request in ascending order and no two with the same destination.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specplus_kernels import dispatch
from specplus_kernels.kv_commit import cpu, reference

__all__ = ["KVCommitPlan", "kv_commit"]


class KVCommitPlan:
    """The caches of one KV group, prepared once; call it once a step with the moves.

    Args:
        caches: logical views [num_blocks, block_size, num_heads, head_size] of any strides and
            dtype, one for K and one for V of every layer. They must stay where they are in memory.

    Raises:
        ValueError: no caches, or their block sizes differ.

    """

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        if len({cache.shape[1] for cache in caches}) != 1:
            sizes = [cache.shape[1] for cache in caches]
            raise ValueError(f"caches must be one KV group of one block size, got {sizes}")
        self._caches = tuple(caches)
        self._pointers = cpu.describe(self._caches)

    def __call__(self, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
        """Moves the rows at `src_slots` to `dst_slots`, both [num_moves] int64.

        Raises:
            ValueError: the slots are not two equally long int64 vectors, or not in the cache.

        """
        if src_slots.dtype != torch.int64 or dst_slots.dtype != torch.int64:
            raise ValueError(f"slots must be int64, got {src_slots.dtype} and {dst_slots.dtype}")
        if src_slots.dim() != 1 or src_slots.shape != dst_slots.shape:
            raise ValueError(
                f"src_slots {tuple(src_slots.shape)} and dst_slots {tuple(dst_slots.shape)} must "
                "be vectors of one length"
            )
        which = dispatch.provider(self._caches[0].device)
        if which == "cpu" and (reason := cpu.refuses(self._caches)):
            which = dispatch.downgrade("kv_commit", reason)
        if which == "cpu":
            cpu.kv_commit(self._pointers, self._caches, src_slots, dst_slots)
        else:
            reference.kv_commit(self._caches, src_slots, dst_slots)


def kv_commit(
    caches: Sequence[torch.Tensor], src_slots: torch.Tensor, dst_slots: torch.Tensor
) -> None:
    """Moves once; a loop over steps should keep a KVCommitPlan, which describes the caches once."""
    KVCommitPlan(caches)(src_slots, dst_slots)
