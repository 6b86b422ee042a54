"""tree_attention_mla on DeepSeek's latent cache: 512 + 64 dims in bf16, 16 or 128 heads.

Expected by arithmetic of an H100 that copies 3.0 TB/s and multiplies 800 TFLOP/s of bf16, not
measured. A slot is 1,152 bytes and, for a row of 128 heads, 0.28 MFLOP: 0.38 ns and 0.35 ns. So one
row is bound by bandwidth and more are bound by the matrix rate:

    requests x rows, context    128 heads                      16 heads (8 GPUs)
          1 x 1, 4096           4.7 MB  1.1 GFLOP    1.6 us    4.7 MB  0.1 GFLOP   1.6 us
          8 x 4, 4096            38 MB   37 GFLOP     46 us     38 MB  4.6 GFLOP    13 us
         32 x 4, 4096           151 MB  146 GFLOP    183 us    151 MB   18 GFLOP    50 us
          8 x 9, 32768          302 MB  657 GFLOP    822 us    302 MB   82 GFLOP   103 us

The kernel's tile of 32 rows is below what the matrix units of sm_90 need (64), so with 128 heads
and several rows it is expected to take several times that.

Peers read contiguous latents without a block table. All masks are chains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.tree_attention_mla import tree_attention_mla

from benchmarks import harness

RANK, ROPE, BLOCK_SIZE = 512, 64, 64
SCALE = 192**-0.5  # of the heads before absorption
# heads, requests, rows of each, context
SIZES = [
    (heads, *size)
    for heads in (16, 128)
    for size in ((1, 1, 4096), (1, 9, 4096), (8, 4, 4096), (32, 4, 4096), (8, 9, 32768))
]
COMPILED = {(16, 8, 4, 4096), (128, 8, 4, 4096)}  # compiling takes some ten seconds


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for size in SIZES:
        _case(benchmark, *size)


def _case(benchmark: harness.Benchmark, heads: int, reqs: int, rows: int, context: int) -> None:
    slots = context + rows
    max_blocks = -(-slots // BLOCK_SIZE)
    with torch.device("cuda"):
        latents = torch.randn(reqs * max_blocks, BLOCK_SIZE, RANK + ROPE, dtype=torch.bfloat16)
        query = torch.randn(reqs * rows, heads, RANK + ROPE, dtype=torch.bfloat16)
        out = query.new_empty(reqs * rows, heads, RANK)
        table = torch.arange(reqs * max_blocks, dtype=torch.int32).view(reqs, -1)
        start = torch.arange(0, reqs * rows + 1, rows, dtype=torch.int32)
        context_lens = torch.full((reqs,), context, dtype=torch.int32)
        chain = torch.tensor([(2 << row) - 1 for row in range(rows)] * reqs)[:, None]
        positions = torch.arange(context, slots).repeat(reqs)
        visible = torch.ones(rows, slots, dtype=torch.bool).tril(context)
    dense = latents.view(reqs, -1, RANK + ROPE)[:, :slots]

    def ours() -> torch.Tensor:
        return tree_attention_mla(
            query, latents, table, start, context_lens, chain, positions,
            scale=SCALE, out=out, max_query_len=rows,
        )  # fmt: skip

    def peer(run: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: run(query.view(reqs, rows, heads, -1), dense, visible)

    peers = {"batched torch": peer(_attend)}
    if (heads, reqs, rows, context) in COMPILED:
        peers["torch.compile"] = peer(torch.compile(_attend, dynamic=False))
    benchmark.case(
        f"{heads} heads {reqs}x{rows} ctx {context}",
        ours,
        peers,
        result=lambda call: call().clone(),
        atol=2**-8,  # probabilities rounded to bf16
        rtol=2**-7,
        num_bytes=query.nbytes + out.nbytes + dense.nbytes,
        num_flops=2 * reqs * rows * heads * slots * (RANK + ROPE + RANK),
    )


def _attend(query: torch.Tensor, latents: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The op's equation, batched; query [reqs, rows, heads, dim], latents [reqs, slots, dim]."""
    scores = torch.einsum("brhd,bsd->bhrs", query, latents).float() * SCALE
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).to(latents.dtype)
    return torch.einsum("bhrs,bsd->brhd", weights, latents[..., :RANK]).flatten(0, 1)


if __name__ == "__main__":
    harness.main(None, "tree_attention_mla", __doc__, run_gpu=run_gpu)
