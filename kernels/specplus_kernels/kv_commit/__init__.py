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

On a GPU a program moves one chunk of a row for one group of moves: it reads a tile of ascending
moves into registers, waits at a barrier until all its threads have read, then writes; the next
tile's sources are no destination of this one, by the argument above. Programs of other chunks,
caches and groups touch other bytes. A view given twice (layers that share their KV) is moved once:
a second pass would read slots that the first has overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from specplus_kernels import dispatch
from specplus_kernels.kv_commit import cpu, reference, words
from specplus_kernels.tiled import is_tiled, plain_shape

__all__ = ["KVCommitPlan", "kv_commit"]


class KVCommitPlan:
    """The caches of one KV group, prepared once; call it once a step with the moves.

    Args:
        caches: logical views [num_blocks, block_size, num_heads, head_size], or
            [num_blocks, block_size, size] of a latent cache, of any strides and dtype; of every
            layer one for K and one for V, or one for both. Or logical views in tiles (tiled.py).
            They must stay where they are in memory.

    Raises:
        ValueError: no caches, their block sizes differ, or two unlike views start at one address.

    """

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        sizes = [plain_shape(cache)[1] for cache in caches]
        if len({*sizes}) != 1:
            raise ValueError(f"caches must be one KV group of one block size, got {sizes}")
        self._caches = _distinct(caches)
        self._pointers = cpu.describe(self._caches)

    @cached_property
    def _words(self) -> words.Words:
        return words.describe(self._caches)

    def __call__(self, src_slots: torch.Tensor, dst_slots: torch.Tensor) -> None:
        """Moves the rows at `src_slots` to `dst_slots`.

        Args:
            src_slots: [num_moves] or [num_reqs, max_moves] int64, ascending moves per request. Only
                rows of a matrix run side by side on a GPU.
            dst_slots: as src_slots.

        Raises:
            ValueError: the slots are not two int64 tensors of one shape, or, where the host can
                see it, not in the cache; a GPU takes such a move for padding.

        """
        if src_slots.dtype != torch.int64 or dst_slots.dtype != torch.int64:
            raise ValueError(f"slots must be int64, got {src_slots.dtype} and {dst_slots.dtype}")
        if src_slots.dim() not in (1, 2) or src_slots.shape != dst_slots.shape:
            raise ValueError(
                f"src_slots {tuple(src_slots.shape)} and dst_slots {tuple(dst_slots.shape)} must "
                "be of one shape, [num_moves] or [num_reqs, max_moves]"
            )
        which = dispatch.provider(self._caches[0].device)
        reason = cpu.refuses(self._caches)
        if which == "triton" and any(map(is_tiled, self._caches)):
            reason = "caches in tiles"
        if which != "reference" and reason:
            which = dispatch.downgrade("kv_commit", reason)
        if which == "triton":
            from specplus_kernels.kv_commit import kernel

            num_blocks, block_size = self._caches[0].shape[:2]
            src_slots, dst_slots = torch.atleast_2d(src_slots, dst_slots)
            num_slots = num_blocks * block_size
            kernel.kv_commit(self._words, block_size, num_slots, src_slots, dst_slots)
        elif which == "cpu":
            src_slots, dst_slots = src_slots.flatten(), dst_slots.flatten()
            cpu.kv_commit(self._pointers, self._caches, src_slots, dst_slots)
        else:
            reference.kv_commit(self._caches, src_slots, dst_slots)


def kv_commit(
    caches: Sequence[torch.Tensor], src_slots: torch.Tensor, dst_slots: torch.Tensor
) -> None:
    """Moves once; a loop over steps should keep a KVCommitPlan, which describes the caches once."""
    KVCommitPlan(caches)(src_slots, dst_slots)


def _distinct(caches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each view once, with its heads as a dimension."""
    found: dict[int, torch.Tensor] = {}
    for cache in caches:
        view = cache.unsqueeze(2) if cache.dim() == 3 else cache
        first = found.setdefault(view.data_ptr(), view)
        if (first.shape, first.stride()) != (view.shape, view.stride()):
            raise ValueError(
                f"caches {tuple(first.shape)} and {tuple(cache.shape)} start at one address; pass "
                "one view of each piece of memory"
            )
    return tuple(found.values())
