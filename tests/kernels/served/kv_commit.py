"""32 layers of 8 heads of 128, K and V in one row; a latent cache; 8 requests of 4 moves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from specplus_kernels.kv_commit import KVCommitPlan


@cache
def _plan(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> KVCommitPlan:
    """Made once, ahead of any capture, as an engine does."""
    return KVCommitPlan([torch.empty(shape, dtype=dtype, device=device) for _ in range(32)])


def _commit(*shape: int, dtype: torch.dtype = torch.bfloat16, num_moves: int = 4) -> None:
    slots = torch.zeros(8, num_moves, dtype=torch.int64)
    _plan(slots.device, shape, dtype)(slots, slots)


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("8x128 bf16", lambda: _commit(100, 16, 8, 256)),
    ("8x128 fp8, 16 moves", lambda: _commit(100, 16, 8, 256, dtype=torch.uint8, num_moves=16)),
    ("latent 576 bf16", lambda: _commit(100, 64, 576)),
]
