"""What is served of rejection: chains of sampled nodes by both rules, and n-gram drafts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.rejection import ChainRule, rejection


def _launch(
    rule: ChainRule,
    num_reqs: int,
    max_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    draft_dtype: torch.dtype | None,
) -> object:
    num_rows = num_reqs * max_rows
    index, shape = torch.empty(num_rows, dtype=torch.int64), (num_rows, vocab_size)
    return rejection(
        rule,
        torch.empty(shape, dtype=dtype),
        None if draft_dtype is None else torch.empty(shape, dtype=draft_dtype),
        index,
        torch.empty(num_reqs + 1, dtype=torch.int32),
        None,
        torch.empty(num_rows),
        index,
        index,
        max_rows=max_rows,
    )


FP32, BF16 = torch.float32, torch.bfloat16
LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("standard, 1 x 4", lambda: _launch("standard", 1, 4, 151_936, FP32, BF16)),
    ("standard, 64 x 4", lambda: _launch("standard", 64, 4, 151_936, BF16, BF16)),
    ("standard, deterministic, 8 x 6", lambda: _launch("standard", 8, 6, 32_000, FP32, None)),
    ("block, 32 x 8", lambda: _launch("block", 32, 8, 262_144, FP32, BF16)),
]
