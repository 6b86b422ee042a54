"""What is served of tree_verify: fp32 logits as vLLM processes them, and bf16; trees and chains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.tree_verify import tree_verify


def _launch(
    num_reqs: int, max_rows: int, vocab_size: int, dtype: torch.dtype, tree: bool
) -> object:
    num_rows = num_reqs * max_rows
    index = torch.empty(num_rows, dtype=torch.int64)
    return tree_verify(
        torch.empty(num_rows, vocab_size, dtype=dtype),
        index,
        index if tree else None,
        torch.empty(num_reqs + 1, dtype=torch.int32),
        torch.empty(num_rows),
        index,
        index,
        max_rows=max_rows,
    )


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("tree, 1 x 17 rows, fp32", lambda: _launch(1, 17, 151_936, torch.float32, True)),
    ("tree, 8 x 65 rows, bf16", lambda: _launch(8, 65, 262_144, torch.bfloat16, True)),
    ("tree, 1 x 128 rows, fp16", lambda: _launch(1, 128, 32_000, torch.float16, True)),
    ("chain, 64 x 4 rows, fp32", lambda: _launch(64, 4, 151_936, torch.float32, False)),
]
