"""row_argmax over Gemma's vocabulary; bf16 logits are 0.5 MB a row: 16 us at 32 GB/s."""

from __future__ import annotations

import torch
from specplus_kernels import row_argmax

from benchmarks import harness

VOCAB_SIZE = 262_144


def run(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    import vllm._C  # noqa: F401  registers the stock op

    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 4, 8, 16):
            _case(benchmark, torch.randn(rows, VOCAB_SIZE).to(dtype))


def _case(benchmark: harness.Benchmark, logits: torch.Tensor) -> None:
    benchmark.case(
        f"{len(logits)} x {VOCAB_SIZE} {logits.dtype}",
        lambda: row_argmax(logits),
        {"vllm": lambda: torch.ops._C.greedy_argmax(logits.float())},
    )


if __name__ == "__main__":
    harness.main(run, "row_argmax", __doc__)
