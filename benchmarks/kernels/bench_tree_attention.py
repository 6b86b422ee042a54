"""tree_attention on vLLM's CPU cache, next to vLLM's causal op (the lower bound of a chain).

A (row, head) takes 2 * slots * head_size multiply-adds: 4/1/256 with 200 slots and 8 rows is 3.3
million, 27 us at two 16-lane FMAs a cycle and 3.8 GHz.
"""

from __future__ import annotations

import torch
from specplus_kernels import tree_attention

from benchmarks import harness

BLOCK_SIZE = 128
# query heads, KV heads, head size, context, requests, rows of each, sliding window
SIZES = [
    *[(4, 1, 256, 200, 1, rows, -1) for rows in (1, 4, 8, 16)],
    *[(4, 1, 256, 800, 1, rows, -1) for rows in (8, 16)],
    (4, 1, 256, 800, 1, 16, 512),
    (4, 1, 256, 200, 8, 8, -1),
    (32, 8, 128, 800, 1, 8, -1),
    (32, 8, 128, 800, 1, 16, -1),
]


def run(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for size in SIZES:
        _case(benchmark, *size)


def _case(
    benchmark: harness.Benchmark,
    heads: int,
    kv_heads: int,
    dim: int,
    context: int,
    reqs: int,
    rows: int,
    window: int,
) -> None:
    from vllm import _custom_ops as ops

    max_blocks, scale = -(-(context + rows) // BLOCK_SIZE), dim**-0.5
    memory = torch.randn(reqs * max_blocks, kv_heads, 2 * BLOCK_SIZE, dim).bfloat16()
    stock_keys, stock_values = memory.chunk(2, dim=2)
    keys = stock_keys.view(-1, kv_heads, dim, BLOCK_SIZE).permute(0, 3, 1, 2)
    values = stock_values.transpose(1, 2)
    query = torch.randn(reqs * rows, heads, dim).bfloat16()
    table = torch.arange(reqs * max_blocks, dtype=torch.int32).view(reqs, -1)
    start = torch.arange(0, reqs * rows + 1, rows, dtype=torch.int32)
    context_lens = torch.full((reqs,), context, dtype=torch.int32)
    seq_lens = context_lens + rows
    chain = torch.tensor([(2 << row) - 1 for row in range(rows)] * reqs)[:, None]
    positions = torch.arange(context, context + rows).repeat(reqs)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        reqs, heads, kv_heads, dim, seq_lens, query.dtype, start, True, window, "vec", True
    )
    out, stock_out = torch.empty_like(query), torch.empty_like(query)

    def stock() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query, stock_keys, stock_values, stock_out, start, seq_lens, scale, True, None, window,
            table, 0.0, metadata, None,
        )  # fmt: skip
        return stock_out

    def ours() -> torch.Tensor:
        return tree_attention(
            query, keys, values, table, start, context_lens, chain, positions,
            scale=scale, out=out, sliding_window=window,
        )  # fmt: skip

    size = f"{heads}/{kv_heads}/{dim} ctx {context} rows {reqs}x{rows} win {window}"
    peers = {"vllm causal": stock}
    benchmark.case(size, ours, peers, result=lambda call: call().clone(), atol=1e-4, rtol=2**-7)


if __name__ == "__main__":
    harness.main(run, "tree_attention", __doc__)
