"""tree_grow: one level of EAGLE-2's expansion (k = 8, bf16 logits), and the final choice.

Expected of an H100 by arithmetic: the logits are read once, at 3.0 TB/s

    requests x width     32,000     151,936     262,144 tokens
              1 x 1      0.02 us     0.1 us      0.2 us
              8 x 8      1.4 us      6.5 us     11.2 us
            32 x 16     10.9 us     51.9 us     89.5 us

and about 12 us more: two launches with their first loads at 2 us each, 8 rounds of choosing in a
part of the vocabulary at half a microsecond, 8 + 8 in the merge at a quarter. So 8 x 8 at 152k is
expected at 18 us, against the goal of 25. A choice among candidates is two launches of about 3 us
each.

The peers are what EAGLE's own code does (log_softmax, two top-k), eager and, for 8 requests at
152k, compiled. They resolve ties in any way, so scores are compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.tree_grow import expand, rerank

from benchmarks import harness

K = 8
Level = tuple[torch.Tensor, torch.Tensor]  # scores of the children, next frontier
SCORE_TOLERANCE = 1e-4  # sums of 262k exponentials in fp32, in another order


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for vocab_size in (32_000, 151_936, 262_144):
        for reqs in (1, 8, 32):
            for width in (1, 8, 16):
                _expand_case(benchmark, reqs, width, vocab_size)
    for num_candidates, num_nodes in ((136, 16), (328, 64), (1296, 127)):
        _rerank_case(benchmark, 8, num_candidates, num_nodes)


def _expand_case(benchmark: harness.Benchmark, reqs: int, width: int, vocab_size: int) -> None:
    with torch.device("cuda"):
        logits = (torch.randn(reqs * width, vocab_size) * 3).bfloat16()
        frontier = torch.arange(width).expand(reqs, width).contiguous()
        scores = torch.zeros(reqs, width + width * K)
        tokens, parents = torch.zeros(2, *scores.shape, dtype=torch.int64)
    scores[:, :width] = -torch.arange(width, device="cuda").float()
    next_width = min(width * K, 8)

    def ours() -> Level:
        buffers = tokens, parents, scores
        following = expand(logits, frontier, *buffers, start=width, k=K, next_width=next_width)
        return scores[:, width:], following

    def peer(run: Callable[..., Level]) -> Callable[[], Level]:
        return lambda: run(logits, frontier, scores[:, :width], next_width)

    peers = {"eager": peer(_log_softmax_and_top_k)}
    if (reqs, vocab_size) == (8, 151_936):
        peers["torch.compile"] = peer(torch.compile(_log_softmax_and_top_k, dynamic=False))
    benchmark.case(
        f"expand {reqs}x{width} of {vocab_size}",
        ours,
        peers,
        result=lambda call: call()[0].sort(dim=1).values,
        atol=SCORE_TOLERANCE,
        rtol=SCORE_TOLERANCE,
        num_bytes=logits.nbytes,
    )


def _log_softmax_and_top_k(
    logits: torch.Tensor, frontier: torch.Tensor, scores: torch.Tensor, next_width: int
) -> Level:
    best = logits.float().log_softmax(-1).topk(K)
    children = (scores.gather(1, frontier).view(-1, 1) + best.values).view(len(frontier), -1)
    return children, children.topk(next_width).indices


def _rerank_case(benchmark: harness.Benchmark, reqs: int, num: int, num_nodes: int) -> None:
    with torch.device("cuda"):
        parents = ((torch.arange(num) - K) // K).clamp(min=-1).expand(reqs, num).contiguous()
        scores = -torch.rand(reqs, num)
        tokens = torch.randint(0, 32_000, (reqs, num))
    for node in range(num):
        above = scores.gather(1, parents[:, node, None].clamp(min=0)).squeeze(1)
        scores[:, node] += above * (parents[:, node] >= 0)
    benchmark.case(
        f"rerank {reqs}x{num_nodes} of {num}",
        lambda: tuple(rerank(tokens, parents, scores, num_nodes=num_nodes)),
    )


if __name__ == "__main__":
    harness.main(None, "tree_grow", __doc__, run_gpu=run_gpu)
