"""The configurations of tree_attention that are served, for the compile gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from specplus_kernels.tree_attention import tree_attention

MAX_CONTEXT = 32768


def _launch(
    heads: int,
    kv_heads: int,
    head_size: int,
    rows: int,
    *,
    reqs: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    block_size: int = 16,
    sinks: bool = False,
    draft_level: bool = False,
    **options: Any,
) -> torch.Tensor:
    cache_dtype = cache_dtype or dtype
    # vLLM's V2 cache: K half, then V half.
    blocks = torch.empty(1024, kv_heads, block_size, 2 * head_size).to(cache_dtype)
    keys, values = blocks.transpose(1, 2).split(head_size, dim=-1)
    query = torch.empty(reqs * rows, heads, head_size, dtype=dtype)
    fp8 = torch.ones(1) if cache_dtype != dtype else None
    return tree_attention(
        query,
        keys,
        values,
        torch.empty(reqs, MAX_CONTEXT // block_size, dtype=torch.int32),
        torch.empty(reqs + 1, dtype=torch.int32),
        torch.empty(reqs, dtype=torch.int32),
        torch.empty(reqs * rows, -(-rows // 64), dtype=torch.int64),
        torch.empty(reqs * rows, dtype=torch.int64),
        scale=head_size**-0.5,
        out=torch.empty_like(query),
        max_query_len=rows,
        k_scale=fp8,
        v_scale=fp8,
        sinks=torch.empty(heads) if sinks else None,
        tail_lens=torch.empty(reqs, dtype=torch.int32) if draft_level else None,
        tail_positions=torch.empty(reqs, 64, dtype=torch.int64) if draft_level else None,
        **options,
    )


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("bf16 32/8x128 rows 1", partial(_launch, 32, 8, 128, 1)),
    ("bf16 32/8x128 rows 9", partial(_launch, 32, 8, 128, 9)),
    ("bf16 32/8x128 rows 17 block 128", partial(_launch, 32, 8, 128, 17, block_size=128)),
    ("bf16 32/8x128 rows 17 one split", partial(_launch, 32, 8, 128, 17, reqs=64)),
    (
        "bf16 32/8x128 draft level of 8",
        partial(_launch, 32, 8, 128, 8, draft_level=True, sliding_window=1024),
    ),
    ("bf16 64/8x128 rows 65", partial(_launch, 64, 8, 128, 65)),
    ("bf16 8/1x256 rows 1", partial(_launch, 8, 1, 256, 1)),
    ("bf16 8/1x256 rows 17 window 512", partial(_launch, 8, 1, 256, 17, sliding_window=512)),
    ("bf16 8/1x256 rows 65 cap", partial(_launch, 8, 1, 256, 65, logits_soft_cap=50.0)),
    (
        "bf16 64/8x64 rows 9 sinks window",
        partial(_launch, 64, 8, 64, 9, sinks=True, sliding_window=128),
    ),
    ("fp16 32/32x80 rows 17", partial(_launch, 32, 32, 80, 17, dtype=torch.float16)),
    ("bf16 32/8x96 rows 17", partial(_launch, 32, 8, 96, 17)),
    ("bf16 128/8x192 rows 9", partial(_launch, 128, 8, 192, 9)),
    ("fp8 32/8x128 rows 17", partial(_launch, 32, 8, 128, 17, cache_dtype=torch.float8_e4m3fn)),
    ("fp32 4/2x64 rows 9", partial(_launch, 4, 2, 64, 9, dtype=torch.float32)),
]
