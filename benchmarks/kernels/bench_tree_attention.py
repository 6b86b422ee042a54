"""tree_attention on vLLM's CPU cache, and on a GPU on the V2 runner's cache.

CPU, next to vLLM's causal op (the lower bound of a chain). A (row, head) takes 2 * slots *
head_size multiply-adds: 4/1/256 with 200 slots and 8 rows is 3.3 million, 27 us at two 16-lane FMAs
a cycle and 3.8 GHz.

GPU, expected by arithmetic of an H100 that copies 3.0 TB/s and multiplies 800 TFLOP/s of bf16, not
measured. K and V of a slot are 4 KiB (32/8x128) or 1 KiB (8/1x256), read once for all rows; with 17
rows a slot takes 0.28 or 0.14 MFLOP, a quarter to a half of the time of its bytes:

    requests x context    32/8x128            8/1x256
          1 x 4096        17 MB    5.6 us     4.2 MB   1.4 us
          8 x 4096       134 MB     45 us      34 MB    11 us
         32 x 4096       537 MB    179 us     134 MB    45 us
         64 x 4096       1.1 GB    358 us     268 MB    89 us
          8 x 32768      1.1 GB    358 us     268 MB    89 us

Below some 30 us the launches count: about 3 us for the kernel and 3 us for combining its splits.

Peers on a GPU, but for vLLM's kernel, read contiguous KV without a block table: lower bounds. All
masks are chains: what a mask says does not change the work, and causal kernels can answer a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from specplus_kernels.tiled import amx_kv_views, vec_kv_views
from specplus_kernels.tree_attention import tree_attention

from benchmarks import harness

BLOCK_SIZE = 128
# query heads, KV heads, head size, context, requests, rows of each, sliding window
SIZES = [
    *[(4, 1, 256, 200, 1, rows, -1) for rows in (1, 4, 8, 16)],
    *[(4, 1, 256, 800, 1, rows, -1) for rows in (8, 16)],
    (4, 1, 256, 800, 1, 16, 512),
    *[(4, 1, 256, 800, 1, rows, -1) for rows in (48, 62)],
    (4, 1, 256, 200, 8, 8, -1),
    (32, 8, 128, 800, 1, 8, -1),
    (32, 8, 128, 800, 1, 16, -1),
]


GPU_BLOCK_SIZE = 16
GPU_HEADS = [(32, 8, 128), (8, 1, 256)]
# requests, rows of each, context
GPU_SIZES = [
    *[(1, rows, 4096) for rows in (1, 4, 8, 17, 33, 65)],
    *[(1, 17, context) for context in (512, 32768)],
    *[(8, rows, 4096) for rows in (1, 8, 17, 65)],
    *[(8, 17, context) for context in (512, 32768)],
    *[(32, 17, context) for context in (512, 4096)],
    *[(64, rows, 4096) for rows in (1, 17)],
]
COMPILED = {(1, 17, 4096), (8, 17, 4096)}  # compiling takes some ten seconds


def run(benchmark: harness.Benchmark) -> None:
    """All sizes on a CPU, in every layout of the KV cache that vLLM chooses there."""
    for size in SIZES:
        for layout in ("vec", "amx") if torch.cpu._init_amx() else ("vec",):
            _cpu_case(benchmark, layout, *size)


def _cpu_case(
    benchmark: harness.Benchmark,
    layout: str,
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
    views = amx_kv_views if layout == "amx" else vec_kv_views
    keys, values = views(memory.view(-1, kv_heads, BLOCK_SIZE, 2 * dim))
    query = torch.randn(reqs * rows, heads, dim).bfloat16()
    table = torch.arange(reqs * max_blocks, dtype=torch.int32).view(reqs, -1)
    start = torch.arange(0, reqs * rows + 1, rows, dtype=torch.int32)
    context_lens = torch.full((reqs,), context, dtype=torch.int32)
    seq_lens = context_lens + rows
    chain = torch.tensor([(2 << row) - 1 for row in range(rows)] * reqs)[:, None]
    positions = torch.arange(context, context + rows).repeat(reqs)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        reqs, heads, kv_heads, dim, seq_lens, query.dtype, start, True, window, layout, True
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

    size = f"{heads}/{kv_heads}/{dim} ctx {context} rows {reqs}x{rows} win {window} {layout}"
    peers = {"vllm causal": stock}
    atol = 2**-8 if layout == "amx" else 1e-4  # vLLM's kernel for AMX rounds probabilities
    benchmark.case(size, ours, peers, result=lambda call: call().clone(), atol=atol, rtol=2**-7)


@dataclass(frozen=True, slots=True)
class _Problem:
    """Chains of `rows` after `context` slots, whose blocks lie in the order of the table."""

    query: torch.Tensor  # [reqs * rows, heads, head_size]
    keys: torch.Tensor  # [num_blocks, block_size, kv_heads, head_size], half of a V2 cache
    values: torch.Tensor
    table: torch.Tensor  # [reqs, max_blocks] int32
    start: torch.Tensor  # [reqs + 1] int32
    context_lens: torch.Tensor  # [reqs] int32
    mask: torch.Tensor  # [reqs * rows, words] int64
    positions: torch.Tensor  # [reqs * rows] int64
    rows: int
    context: int

    def ours(self, out: torch.Tensor) -> torch.Tensor:
        return tree_attention(
            self.query, self.keys, self.values, self.table, self.start, self.context_lens,
            self.mask, self.positions, scale=self.query.shape[2] ** -0.5,
            out=out, max_query_len=self.rows,
        )  # fmt: skip

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query [reqs, heads, rows, head_size], keys and values [reqs, kv_heads, slots, ...]."""
        reqs, slots = len(self.table), self.context + self.rows
        query = self.query.unflatten(0, (reqs, self.rows)).transpose(1, 2).contiguous()
        keys, values = (
            cache.reshape(reqs, -1, *cache.shape[2:])[:, :slots].transpose(1, 2).contiguous()
            for cache in (self.keys, self.values)
        )
        return query, keys, values


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes on a GPU."""
    for heads in GPU_HEADS:
        for size in GPU_SIZES:
            _gpu_case(benchmark, *heads, *size)


def _gpu_case(
    benchmark: harness.Benchmark,
    heads: int,
    kv_heads: int,
    dim: int,
    reqs: int,
    rows: int,
    context: int,
) -> None:
    problem = _make(heads, kv_heads, dim, reqs, rows, context)
    out = torch.empty_like(problem.query)
    peers = {"sdpa flash": _sdpa(problem)}
    if (reqs, rows, context) in COMPILED:
        peers |= {"torch.compile": _compiled(problem), "flex": _flex(problem)}
    if find_spec("vllm") is not None:
        peers["vllm unified"] = _vllm(problem)
    slots = context + rows
    benchmark.case(
        f"{heads}/{kv_heads}x{dim} {reqs}x{rows} ctx {context}",
        lambda: problem.ours(out),
        peers,
        result=_rows_first,
        atol=2**-8,  # probabilities rounded to bf16
        rtol=2**-7,
        num_bytes=2 * out.nbytes + 4 * reqs * slots * kv_heads * dim,
        num_flops=4 * reqs * rows * heads * slots * dim,
    )


def _make(heads: int, kv_heads: int, dim: int, reqs: int, rows: int, context: int) -> _Problem:
    max_blocks = -(-(context + rows) // GPU_BLOCK_SIZE)
    mask = torch.zeros(rows, -(-rows // 64), dtype=torch.int64)
    for row in range(rows):
        for seen in range(row + 1):
            mask[row, seen // 64] |= torch.tensor(1) << seen % 64
    with torch.device("cuda"):
        memory = torch.randn(
            reqs * max_blocks, kv_heads, GPU_BLOCK_SIZE, 2 * dim, dtype=torch.bfloat16
        )
        keys, values = memory.transpose(1, 2).split(dim, dim=-1)
        return _Problem(
            query=torch.randn(reqs * rows, heads, dim, dtype=torch.bfloat16),
            keys=keys,
            values=values,
            table=torch.arange(reqs * max_blocks, dtype=torch.int32).view(reqs, -1),
            start=torch.arange(0, reqs * rows + 1, rows, dtype=torch.int32),
            context_lens=torch.full((reqs,), context, dtype=torch.int32),
            mask=mask.cuda().repeat(reqs, 1),
            positions=torch.arange(context, context + rows).repeat(reqs),
            rows=rows,
            context=context,
        )


def _rows_first(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """[tokens, heads, dim] of a peer's [reqs, heads, rows, dim]; untimed."""
    out = call()
    return out.transpose(1, 2).flatten(0, 1) if out.dim() == 4 else out.clone()


def _sdpa(problem: _Problem) -> Callable[[], torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    query, keys, values = problem.dense()
    causal = causal_lower_right(problem.rows, keys.shape[2])
    attend = torch.nn.functional.scaled_dot_product_attention

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend(query, keys, values, attn_mask=causal, enable_gqa=True)

    return run


def _flex(problem: _Problem) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, keys, values = problem.dense()
    words, context = problem.mask.view(len(query), problem.rows, -1)[..., 0], problem.context

    def visible(req, head, row, slot):  # type: ignore[no-untyped-def]
        seen = words[req, row] >> (slot - context).clamp(0, 63)
        return (slot < context) | (seen & 1 == 1)

    block_mask = create_block_mask(visible, len(query), None, problem.rows, keys.shape[2], "cuda")
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(query, keys, values, block_mask=block_mask, enable_gqa=True)


def _compiled(problem: _Problem) -> Callable[[], torch.Tensor]:
    tensors = problem.dense()
    causal = torch.ones(problem.rows, tensors[1].shape[2], dtype=torch.bool, device="cuda")
    visible = causal.tril(problem.context)
    run = torch.compile(_attend, dynamic=False)
    return lambda: run(*tensors, visible)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """The reference's equation, batched."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = (query @ keys.mT).float() * query.shape[3] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.to(values.dtype) @ values


def _vllm(problem: _Problem) -> Callable[[], torch.Tensor]:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    segments, (num_tokens, heads, dim) = 16, problem.query.shape
    out = torch.empty_like(problem.query)
    partial = out.new_empty((num_tokens, heads, segments, dim), dtype=torch.float32)
    peaks, sums = (partial.new_empty(partial.shape[:3]) for _ in range(2))
    slots = problem.context + problem.rows
    seq_lens = problem.context_lens + problem.rows

    def run() -> torch.Tensor:
        unified_attention(
            problem.query, problem.keys, problem.values, out, problem.start, problem.rows,
            seq_lens, slots, dim**-0.5, True, (-1, -1), problem.table, 0.0, None, None, None,
            seq_threshold_3D=128 // problem.keys.shape[2], num_par_softmax_segments=segments,
            softmax_segm_output=partial, softmax_segm_max=peaks, softmax_segm_expsum=sums,
        )  # fmt: skip
        return out

    return run


if __name__ == "__main__":
    harness.main(run, "tree_attention", __doc__, run_gpu=run_gpu)
