"""Trees as the rows that the target model verifies."""

from __future__ import annotations

from typing import NamedTuple

import torch

WORD_BITS = 64
MAX_ROWS = 128
"""Of a tree, root included: what ancestor masks and kernels are built for."""


class TreeRows(NamedTuple):
    """One tree per request: row 0 its root, then nodes in an order whose every prefix is a tree."""

    tokens: torch.Tensor  # [num_reqs, num_rows] int64; -1 at the root and at padding
    parents: torch.Tensor  # [num_reqs, num_rows] int64, rows; -1 at the root, 0 at padding
    depths: torch.Tensor  # [num_reqs, num_rows] int64; 0 at the root and at padding
    ancestor_mask: torch.Tensor  # [num_reqs, num_rows, words] int64, bit j of word w: row 64w + j
    num_nodes: torch.Tensor  # [num_reqs] int64, without the root


def empty_rows(num_reqs: int, num_nodes: int, device: torch.device) -> TreeRows:
    """Memory for trees of up to `num_nodes` nodes."""
    num_rows = num_nodes + 1
    words = -(-num_rows // WORD_BITS)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(num_reqs, *shape, dtype=torch.int64, device=device)

    return TreeRows(
        tokens=empty(num_rows),
        parents=empty(num_rows),
        depths=empty(num_rows),
        ancestor_mask=empty(num_rows, words),
        num_nodes=empty(),
    )


def tree_rows(tokens: torch.Tensor, parents: torch.Tensor, num_nodes: torch.Tensor) -> TreeRows:
    """Adds what follows from the parents: depths, ancestors and padding; in plain torch.

    Args:
        tokens: [num_reqs, max_nodes] int64, of the nodes alone.
        parents: [num_reqs, max_nodes] int64, rows, each before its node's own.
        num_nodes: [num_reqs] int64.

    """
    num_reqs, max_nodes = tokens.shape
    rows = empty_rows(num_reqs, max_nodes, tokens.device)
    row = torch.arange(max_nodes + 1, device=tokens.device)
    is_node = row[1:] <= num_nodes[:, None]
    rows.num_nodes.copy_(num_nodes)
    rows.tokens[:, 0], rows.tokens[:, 1:] = -1, tokens.where(is_node, -1)
    rows.parents[:, 0], rows.parents[:, 1:] = -1, parents.where(is_node, 0)
    own = torch.zeros_like(rows.ancestor_mask)
    own[:, row, row // WORD_BITS] = torch.ones_like(row) << row % WORD_BITS
    rows.depths[:, 0], rows.ancestor_mask[:, 0] = 0, own[:, 0]
    each = torch.arange(num_reqs, device=tokens.device)
    for node in range(1, max_nodes + 1):
        real, parent = is_node[:, node - 1], rows.parents[:, node]
        rows.depths[:, node] = real * (rows.depths[each, parent] + 1)
        ancestors = rows.ancestor_mask[each, parent] | own[:, node]
        rows.ancestor_mask[:, node] = real[:, None] * ancestors
    return rows
