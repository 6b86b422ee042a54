"""tree_verify: the target's token of every row, and the walk of trees of eight rows.

Expected of an H100 by arithmetic, not measured: the logits are read once, at 3.0 TB/s

    rows      32,000 fp32    151,936 fp32    262,144 fp32    151,936 bf16
       8          0.3 us          1.6 us          2.8 us          0.8 us
      64          2.7 us         13.0 us         22.4 us          6.5 us
     256         10.9 us         51.9 us         89.5 us         25.9 us
     512         21.8 us        103.7 us        179.0 us         51.9 us

and about 6 us more for two launches, so 8 rows are bound by launches. Greedy rows and filtered ones
(top-k leaves -inf) should reach 80 % of the copy bandwidth from 256 rows of 152k. Noise costs about
25 integer and 25 floating-point operations and three logarithms a token: at 14 T integer
operations/s that is 70 us for 256 x 152k, so a dense sampled row is bound by arithmetic (bf16 more
than fp32) except where the block maximum shows that no noise can make a token win.

The peers draw the same noise: the torch reference's formula compiled, and vLLM's own kernel where
that package is importable. Tokens are compared; the walk is ours alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from specplus_kernels.sampling import noise
from specplus_kernels.tree_verify import tree_verify

from benchmarks import harness

TREE = [-1, 0, 0, 0, 1, 1, 2, 4]


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for vocab_size in (32_000, 151_936, 262_144):
        for rows in (8, 64, 256, 512):
            for kind in ("greedy", "sampled"):
                _case(benchmark, rows, vocab_size, torch.float32, kind)
    for kind in ("greedy", "sampled", "top-k"):
        _case(benchmark, 256, 151_936, torch.bfloat16, kind)
    _case(benchmark, 256, 151_936, torch.float32, "top-k")


def _case(
    benchmark: harness.Benchmark, rows: int, vocab_size: int, dtype: torch.dtype, kind: str
) -> None:
    num_reqs = rows // len(TREE)
    with torch.device("cuda"):
        logits = 3 * torch.randn(rows, vocab_size)
        if kind == "top-k":
            floor = logits.topk(50).values[:, -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        logits = logits.to(dtype)
        drafts = logits.argmax(1).roll(1)
        parents = torch.tensor(TREE * num_reqs)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32) * len(TREE)
        temperature = torch.full((rows,), 0.0 if kind == "greedy" else 1.0)
        seeds, positions = torch.arange(rows) // len(TREE), torch.arange(rows)

    def ours() -> torch.Tensor:
        arguments = (logits, drafts, parents, starts, temperature, seeds, positions)
        return tree_verify(*arguments, max_rows=len(TREE), max_path=3)[1]

    peers: dict[str, Callable[[], torch.Tensor]] = {}
    if rows == 256:
        peers["torch.compile"] = lambda: _compiled()(logits, temperature, seeds, positions)
    if (stock := _stock()) is not None:
        rows_of = torch.arange(rows, dtype=torch.int32, device="cuda")
        peers["vllm"] = lambda: stock(
            logits,
            rows_of,
            temperature,
            seeds,
            positions,
            apply_temperature=False,
            is_drafting=False,
        )
    benchmark.case(
        f"{rows} x {vocab_size} {str(dtype)[6:]} {kind}", ours, peers, num_bytes=logits.nbytes
    )


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(_tokens)


def _tokens(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    tokens = torch.arange(logits.shape[1], device=logits.device)
    noised = logits + noise.gumbel(seeds[:, None], positions[:, None], tokens)
    return torch.where((temperature == 0)[:, None], logits.float(), noised).argmax(1)


@cache
def _stock() -> Callable[..., torch.Tensor] | None:
    """vLLM's sampling kernel, None where it is not installed."""
    try:
        from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    except ImportError:
        return None
    return gumbel_sample


if __name__ == "__main__":
    harness.main(None, "tree_verify", __doc__, run_gpu=run_gpu)
