"""The configurations of tree_attention_mla that are served, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from specplus_kernels.tree_attention_mla import tree_attention_mla

RANK, ROPE = 512, 64  # DeepSeek-V2, V3 and R1
MAX_CONTEXT, BLOCK_SIZE = 32768, 64


def _launch(
    heads: int, rows: int, reqs: int = 8, cache_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    query = torch.empty(reqs * rows, heads, RANK + ROPE, dtype=torch.bfloat16)
    return tree_attention_mla(
        query,
        torch.empty(1024, BLOCK_SIZE, RANK + ROPE).to(cache_dtype),
        torch.empty(reqs, MAX_CONTEXT // BLOCK_SIZE, dtype=torch.int32),
        torch.empty(reqs + 1, dtype=torch.int32),
        torch.empty(reqs, dtype=torch.int32),
        torch.empty(reqs * rows, -(-rows // 64), dtype=torch.int64),
        torch.empty(reqs * rows, dtype=torch.int64),
        scale=192**-0.5,
        out=query.new_empty(reqs * rows, heads, RANK),
        max_query_len=rows,
        kv_scale=None if cache_dtype == torch.bfloat16 else torch.ones(1),
    )


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("bf16 16 heads rows 1", partial(_launch, 16, 1)),
    ("bf16 128 heads rows 9", partial(_launch, 128, 9)),
    ("bf16 128 heads rows 9 one split", partial(_launch, 128, 9, 64)),
    ("fp8 16 heads rows 5", partial(_launch, 16, 5, cache_dtype=torch.float8_e4m3fn)),
]
