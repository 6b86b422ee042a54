"""row_commit: hidden states of 4,096, three auxiliary ones (EAGLE-3), ids and positions, in bf16.

4 moves a request of 17 rows. Expected of an H100 by arithmetic, at 3.0 TB/s read or written:
0.26 MB a request, 0.1 us for 1, 0.7 us (2.1 MB) for 8, 5.6 us (16.8 MB) for 64, and about 3 us more
for the launch and two loads in turn. The peers are torch's gather and scatter without padding,
eager and, for 8 requests, compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.row_commit import row_commit

from benchmarks import harness

HIDDEN, NUM_STATES, ROWS_EACH, MOVES = 4096, 4, 17, 4


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for reqs in (1, 8, 64):
        _case(benchmark, reqs)


def _case(benchmark: harness.Benchmark, reqs: int) -> None:
    rows = reqs * ROWS_EACH
    with torch.device("cuda"):
        pristine = [torch.randn(rows, HIDDEN).bfloat16() for _ in range(NUM_STATES)]
        pristine += [torch.arange(rows, dtype=torch.int32), torch.arange(rows)]
        dst = torch.arange(reqs)[:, None] * ROWS_EACH + torch.arange(1, MOVES + 1)
    src, tensors = dst + 3, [tensor.clone() for tensor in pristine]

    def result(call: Callable[[], None]) -> list[torch.Tensor]:
        for tensor, before in zip(tensors, pristine, strict=True):
            tensor.copy_(before)
        call()
        return [tensor.clone() for tensor in tensors]

    def peer(run: Callable[..., None]) -> Callable[[], None]:
        return lambda: run(tensors, src.flatten(), dst.flatten())

    peers = {"eager": peer(_gather_and_scatter)}
    if reqs == 8:
        peers["torch.compile"] = peer(torch.compile(_gather_and_scatter, dynamic=False))
    benchmark.case(
        f"{NUM_STATES} states of {HIDDEN}, {reqs}x{MOVES} moves",
        lambda: row_commit(tensors, src, dst),
        peers,
        result=result,
        num_bytes=2 * src.numel() * sum(tensor[0].nbytes for tensor in tensors),
    )


def _gather_and_scatter(tensors: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    for tensor in tensors:
        tensor[dst] = tensor[src]


if __name__ == "__main__":
    harness.main(None, "row_commit", __doc__, run_gpu=run_gpu)
