"""8 and 64 requests over histories of 4k, 32k and 128k tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.ngram_match import ngram_match


def _match(num_reqs: int, max_len: int, num_nodes: int, max_depth: int, **kwargs: int) -> None:
    ngram_match(
        torch.zeros(num_reqs, max_len, dtype=torch.int32),
        torch.zeros(num_reqs, dtype=torch.int32),
        torch.zeros(num_reqs, dtype=torch.int32),
        min_n=2,
        max_n=4,
        num_nodes=num_nodes,
        max_depth=max_depth,
        **kwargs,
    )


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("64 x 4096, 16 nodes", lambda: _match(64, 4096, 16, 5)),
    ("8 x 32768, 64 nodes", lambda: _match(8, 32_768, 64, 10)),
    ("8 x 131072, 127 nodes", lambda: _match(8, 131_072, 127, 16, max_matches=16)),
]
