"""What is served of tree_rejection: sampled trees by each rule, mixed kinds, deterministic ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.tree_rejection import TreeRule, tree_rejection


def _launch(
    rule: TreeRule,
    num_reqs: int,
    max_rows: int,
    vocab_size: int,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    mixed: bool = False,
) -> object:
    num_rows = num_reqs * max_rows
    index, (dtype, draft_dtype) = torch.empty(num_rows, dtype=torch.int64), dtypes
    shape = (num_rows, vocab_size)
    return tree_rejection(
        rule,
        torch.empty(shape, dtype=dtype),
        None if draft_dtype is None else torch.empty(shape, dtype=draft_dtype),
        index,
        index,
        torch.empty(num_reqs + 1, dtype=torch.int32),
        torch.empty(num_rows, dtype=torch.bool) if mixed else None,
        torch.empty(num_rows),
        index,
        index,
        max_rows=max_rows,
        max_path=8 if max_rows > 8 else None,
    )


FP32, BF16 = torch.float32, torch.bfloat16
LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("recursive, 8 x 17", lambda: _launch("recursive", 8, 17, 151_936, (FP32, BF16))),
    ("recursive, mixed, 1 x 65", lambda: _launch("recursive", 1, 65, 262_144, (BF16, BF16), True)),
    ("traversal, 8 x 17", lambda: _launch("traversal", 8, 17, 151_936, (FP32, BF16))),
    ("traversal, mixed, 32 x 9", lambda: _launch("traversal", 32, 9, 32_000, (FP32, FP32), True)),
    ("traversal, deterministic", lambda: _launch("traversal", 8, 128, 151_936, (BF16, None))),
    ("typical, 8 x 65", lambda: _launch("typical", 8, 65, 151_936, (FP32, None))),
]
