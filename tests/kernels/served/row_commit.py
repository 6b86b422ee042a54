"""Hidden states of 4,096, three auxiliary ones, ids and positions; 8 requests of 4 moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from specplus_kernels.row_commit import row_commit


def _commit(num_aux: int) -> None:
    states = [torch.empty(512, 4096, dtype=torch.bfloat16) for _ in range(1 + num_aux)]
    ids, positions = torch.empty(512, dtype=torch.int32), torch.empty(512, dtype=torch.int64)
    rows = torch.zeros(8, 4, dtype=torch.int64)
    row_commit([*states, ids, positions], rows, rows)


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    ("hidden, ids, positions", lambda: _commit(0)),
    ("with three auxiliary states", lambda: _commit(3)),
]
