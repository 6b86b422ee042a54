"""Staging of chains, small trees and the largest ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from specplus_kernels.tree_stage import tree_stage


def _stage(max_nodes: int) -> None:
    num_reqs = 8
    num_rows = num_reqs * (max_nodes + 1)
    tree_stage(
        torch.zeros(num_reqs, max_nodes, dtype=torch.int64),
        torch.zeros(num_reqs + 1, dtype=torch.int32),
        torch.zeros(num_reqs + 1, dtype=torch.int32),
        torch.zeros(num_rows, dtype=torch.int64),
        torch.zeros(num_rows, 1 + max_nodes // 64, dtype=torch.int64),
    )


LAUNCHES: list[tuple[str, Callable[[], object]]] = [
    (f"8 trees of {nodes} nodes", partial(_stage, nodes)) for nodes in (3, 16, 63, 127)
]
