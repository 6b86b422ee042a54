"""int8_linear as wide as the draft head of the shipped heads: 21 MB of weights, bfloat16 has 42.

Caches are cooled before each call, as the target's weights do it before a level.
"""

from __future__ import annotations

import torch
from specplus_kernels import Int8Weight, int8_linear

from benchmarks import harness

NUM_OUT, NUM_IN = 32_768, 640
_OTHERS = torch.zeros(16 << 20)


def run(benchmark: harness.Benchmark) -> None:
    """All numbers of inputs."""
    from vllm_specplus.engine.drafters.packed import PackedLinear

    weight = torch.randn(NUM_OUT, NUM_IN, dtype=torch.bfloat16) / 25
    packed, int8 = PackedLinear(weight.clone()), Int8Weight.of(weight)
    for rows in (1, 4, 8, 16, 32):
        _case(benchmark, torch.randn(rows, NUM_IN, dtype=torch.bfloat16), packed, int8)


def _case(
    benchmark: harness.Benchmark, x: torch.Tensor, packed: torch.nn.Module, int8: Int8Weight
) -> None:
    benchmark.case(
        f"{len(x)} x {NUM_IN} -> {NUM_OUT}",
        lambda: int8_linear(x, int8),
        {"vllm bfloat16": lambda: packed(x).float()},
        before=lambda: _OTHERS.add_(1),
        atol=0.1,  # outputs are of unit size, and int8 weights 0.8 % off
    )


if __name__ == "__main__":
    harness.main(run, "int8_linear", __doc__)
