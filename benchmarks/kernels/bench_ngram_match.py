"""ngram_match: 8 matches of 2 to 4 tokens in histories over 50 words, trees of 16 nodes, depth 5.

Expected of an H100 by arithmetic: a history is 4 bytes a token, read once, so that at 3.0 TB/s 64
histories of 4k tokens (1.0 MB) or 8 of 32k (1.0 MB) take 0.4 us and 8 of 128k (4.2 MB) 1.4 us. What
counts is latency: two launches, in each 8 rounds of choosing at about a quarter of a microsecond,
together about 10 us. The reference goes request by request through Python; vLLM's own n-gram kernel
drafts a chain of one match, another question, so there is no peer.
"""

from __future__ import annotations

import torch
from specplus_kernels.ngram_match import ngram_match

from benchmarks import harness


def run_gpu(benchmark: harness.Benchmark) -> None:
    """All sizes."""
    for reqs, num_tokens in ((1, 4096), (8, 4096), (64, 4096), (8, 32_768), (8, 131_072)):
        _case(benchmark, reqs, num_tokens)


def _case(benchmark: harness.Benchmark, reqs: int, num_tokens: int) -> None:
    with torch.device("cuda"):
        tokens = torch.randint(0, 50, (reqs, num_tokens), dtype=torch.int32)
        lens = torch.full((reqs,), num_tokens, dtype=torch.int32)
    benchmark.case(
        f"{reqs} histories of {num_tokens}",
        lambda: tuple(ngram_match(tokens, lens, min_n=2, max_n=4, num_nodes=16, max_depth=5)),
        num_bytes=tokens.nbytes,
    )


if __name__ == "__main__":
    harness.main(None, "ngram_match", __doc__, run_gpu=run_gpu)
