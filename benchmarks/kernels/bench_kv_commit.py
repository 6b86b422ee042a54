"""kv_commit over the 18 layers of Gemma-3-270M; a K column of 256 elements lies in 256 lines.

`cold` reads 32 MB between the calls, as the LM head does between attention and the commit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels import KVCommitPlan

from benchmarks import harness

LAYERS, BLOCKS, BLOCK_SIZE, DIM = 18, 40, 128, 256


def run(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    memory = torch.randn(LAYERS, BLOCKS, 1, 2 * BLOCK_SIZE, DIM).bfloat16()
    for reqs, moves in ((1, 1), (1, 4), (8, 4)):
        _case(benchmark, memory, reqs, moves)


def _case(benchmark: harness.Benchmark, memory: torch.Tensor, reqs: int, moves: int) -> None:
    caches = []
    for layer in memory:
        keys, values = layer.chunk(2, dim=2)
        caches += [keys.view(-1, 1, DIM, BLOCK_SIZE).permute(0, 3, 1, 2), values.transpose(1, 2)]
    plan, other_memory = KVCommitPlan(caches), torch.zeros(8 << 20)
    first = torch.arange(reqs)[:, None] * 3 * BLOCK_SIZE + 40
    dst = (first + torch.arange(moves)).flatten()
    src = dst + 3

    def result(call: Callable[[], None]) -> torch.Tensor:
        memory.copy_(torch.arange(memory.numel()).remainder(251).view_as(memory))
        call()
        return memory.clone()

    size = f"{2 * LAYERS} views, {reqs}x{moves} moves of {DIM}"
    benchmark.case(size, lambda: plan(src, dst), result=result)
    benchmark.case(
        f"{size}, cold", lambda: plan(src, dst), result=result, before=lambda: other_memory.add_(1)
    )


if __name__ == "__main__":
    harness.main(run, "kv_commit", __doc__)
