"""row_gumbel_argmax over Gemma's vocabulary, next to vLLM's steps: to fp32, divide, its own op.

Two 64-bit products and four shifts and exclusive-ors a token: 26 us a row at three cycles for each
vector of eight tokens and 3.8 GHz.
"""

from __future__ import annotations

import torch
from specplus_kernels import row_gumbel_argmax

from benchmarks import harness

VOCAB_SIZE = 262_144


def run(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    import vllm._C  # noqa: F401  registers the stock op

    for spread in (0.0, 3.0):
        for rows in (1, 4, 8):
            _case(benchmark, spread, rows)


def _case(benchmark: harness.Benchmark, spread: float, rows: int) -> None:
    logits = (spread * torch.randn(rows, VOCAB_SIZE)).bfloat16()
    temperature, seeds = torch.full((rows,), 0.8), torch.randint(2**31, (rows,))

    def stock() -> torch.Tensor:
        scaled = logits.float().div_(temperature[:, None])
        return torch.ops._C.fused_gumbel_argmax(scaled, seeds)

    benchmark.case(
        f"{rows} x {VOCAB_SIZE} bf16, spread {spread}",
        lambda: row_gumbel_argmax(logits, temperature, seeds),
        {"vllm": stock},
    )


if __name__ == "__main__":
    harness.main(run, "row_gumbel_argmax", __doc__)
