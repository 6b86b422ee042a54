"""The first and the later levels of a dynamic tree at the vocabularies served, and its choice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.tree_grow import expand, rerank


def _candidates(num_reqs: int, num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, parents = torch.zeros(2, num_reqs, num, dtype=torch.int64)
    return tokens, parents, torch.zeros(num_reqs, num)


def _expand(num_reqs: int, width: int, k: int, vocab_size: int, reduced: bool = False) -> None:
    logits = torch.empty(num_reqs * width, vocab_size, dtype=torch.bfloat16)
    frontier = torch.zeros(num_reqs, width, dtype=torch.int64)
    expand(
        logits,
        frontier,
        *_candidates(num_reqs, 1000),
        start=k,
        k=k,
        next_width=min(8, width * k),
        d2t=torch.zeros(vocab_size, dtype=torch.int64) if reduced else None,
    )


def _rerank(num_candidates: int, num_nodes: int) -> None:
    rerank(*_candidates(8, num_candidates), num_nodes=num_nodes)


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("expand 1 x 1, k 8 of 151936", lambda: _expand(1, 1, 8, 151_936)),
    ("expand 1 x 8, k 8 of 262144", lambda: _expand(1, 8, 8, 262_144)),
    ("expand 8 x 8, k 8 of 151936", lambda: _expand(8, 8, 8, 151_936)),
    ("expand 1 x 16, k 16 of 151936", lambda: _expand(1, 16, 16, 151_936)),
    ("expand 8 x 8, k 8 of 32000, d2t", lambda: _expand(8, 8, 8, 32_000, reduced=True)),
    ("rerank 16 of 136", lambda: _rerank(136, 16)),
    ("rerank 127 of 1296", lambda: _rerank(1296, 127)),
]
