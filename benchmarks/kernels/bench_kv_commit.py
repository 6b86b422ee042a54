"""kv_commit on a CPU: the 18 layers of Gemma-3-270M; a K column of 256 elements lies in 256 lines.

`cold` reads 32 MB between the calls, as the LM head does between attention and the commit.

On a GPU: 32 layers, 4 moves a request; 8 KV heads of 128 with K and V in one row of 4,096 bytes,
and latent rows of 576 x 2 bytes. Expected of an H100 by arithmetic, at 3.0 TB/s read or written:

    requests    8 x 128               latent 576
           1     1.0 MB    0.4 us      0.3 MB   0.1 us
           8     8.4 MB    2.8 us      2.4 MB   0.8 us
          64    67.1 MB   22.4 us     18.9 MB   6.3 us

and about 3 us more, the latency of one launch that loads a table, the slots and the rows in turn.
The peers are torch's gather and scatter cache by cache, without padding: eager and, for 8 requests
of 8 x 128, compiled into one graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels import KVCommitPlan

from benchmarks import harness

LAYERS, BLOCKS, BLOCK_SIZE, DIM = 18, 40, 128, 256
GPU_LAYERS, GPU_BLOCK_SIZE, GPU_MOVES = 32, 16, 4


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


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for reqs in (1, 8, 64):
        _gpu_case(benchmark, "8x128", reqs, (8, 256))
        _gpu_case(benchmark, "latent 576", reqs, (1, 576))


def _gpu_case(benchmark: harness.Benchmark, name: str, reqs: int, row: tuple[int, int]) -> None:
    shape = (reqs, GPU_BLOCK_SIZE, *row)
    pristine = torch.randn(shape, device="cuda").bfloat16()
    caches = [pristine.clone() for _ in range(GPU_LAYERS)]
    first = torch.arange(reqs, device="cuda")[:, None] * GPU_BLOCK_SIZE + 4
    dst = first + torch.arange(GPU_MOVES, device="cuda")
    src, plan = dst + 3, KVCommitPlan(caches)

    def result(call: Callable[[], None]) -> torch.Tensor:
        for cache in caches:
            cache.copy_(pristine)
        call()
        return torch.stack(caches)

    def peer(run: Callable[..., None]) -> Callable[[], None]:
        return lambda: run(caches, src.flatten(), dst.flatten())

    peers = {"eager": peer(_gather_and_scatter)}
    if (reqs, row) == (8, (8, 256)):
        peers["torch.compile"] = peer(torch.compile(_gather_and_scatter, dynamic=False))
    benchmark.case(
        f"{GPU_LAYERS} layers of {name}, {reqs}x{GPU_MOVES} moves",
        lambda: plan(src, dst),
        peers,
        result=result,
        num_bytes=2 * GPU_LAYERS * src.numel() * pristine[0, 0].nbytes,
    )


def _gather_and_scatter(caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    for cache in caches:
        size = cache.shape[1]
        cache[dst // size, dst % size] = cache[src // size, src % size]


if __name__ == "__main__":
    harness.main(run, "kv_commit", __doc__, run_gpu=run_gpu)
