"""One tree from two, on the device; what both have is there once.

Candidates of several drafters are verified in one pass (SpecInfer, Miao et al. 2024, arXiv
2305.09781).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from specplus_kernels.tree_grow import TreeRows, rerank


class Trunk(NamedTuple):
    """Trees to graft others onto: tokens, parents int64 [num_reqs, num_rows], as in TreeRows.

    num_first: nodes that come before all that is grafted.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    num_first: int

    @classmethod
    def chain(cls, tokens: torch.Tensor) -> Trunk:
        """Of chains, int64 [num_reqs, depth], which stay whole."""
        num_reqs, depth = tokens.shape
        parents = torch.arange(-1, depth, device=tokens.device).expand(num_reqs, -1)
        return cls(torch.nn.functional.pad(tokens, (1, 0), value=-1), parents, depth)


def graft(
    trunk: Trunk,
    tree: tuple[torch.Tensor, torch.Tensor],  # tokens, parents: [num_reqs, num_rows] int64
    num_nodes: int,
    max_depth: int,
) -> TreeRows:
    """The trunk's first nodes, then the tree's that are not in the trunk, then the trunk's others.

    A node of the trunk that the tree has too stands where it would in either, as do those above it.
    What is more than `num_nodes` is cut off. max_depth: no node of the tree is deeper.

    >>> tree = torch.tensor([[-1, 7, 8, 9]]), torch.tensor([[-1, 0, 1, 1]])
    >>> grafted = graft(Trunk.chain(torch.tensor([[7, 9]])), tree, num_nodes=4, max_depth=2)
    >>> grafted.tokens.tolist(), grafted.parents.tolist()
    ([[-1, 7, 9, 8, -1]], [[-1, 0, 1, 1, 0]])
    """
    trunk_tokens, trunk_parents, num_first = trunk
    tokens, parents = tree[0], tree[1].clamp(min=0)
    (num_reqs, num_trunk), num_tree = trunk_tokens.shape, tokens.shape[1]
    row = torch.arange(max(num_trunk, num_tree), device=tokens.device)
    is_node = tokens >= 0
    same_token = (tokens[:, :, None] == trunk_tokens[:, None]) & is_node[:, :, None]
    at = torch.where(row[:num_tree] == 0, 0, -1).expand_as(tokens)  # the trunk's row of each node
    for _ in range(max_depth):
        same = same_token & (at.gather(1, parents)[:, :, None] == trunk_parents[:, None])
        found = same.int().argmax(2).where(same.any(2), -1)
        at = torch.where(row[:num_tree] == 0, 0, found)
    shared = is_node & (at > 0)

    place = row[:num_trunk] + num_tree * (row[:num_trunk] > num_first)
    tree_place = (num_first + row[:num_tree]).expand_as(tokens)
    place = place.expand(num_reqs, -1).scatter_reduce(
        1, at.where(shared, 0), tree_place.where(shared, 0), "amin"
    )
    absent = torch.cat([trunk_tokens[:, 1:] < 0, (~is_node | shared)[:, 1:]], 1)
    scores = -torch.cat([place[:, 1:], tree_place[:, 1:]], 1).float()
    above = at.gather(1, parents)
    own_above = torch.where(above >= 0, above - 1, num_trunk - 2 + parents)
    return rerank(
        torch.cat([trunk_tokens[:, 1:], tokens[:, 1:]], 1),
        torch.cat([trunk_parents[:, 1:] - 1, own_above[:, 1:]], 1),
        scores.masked_fill(absent, -torch.inf),
        num_nodes=num_nodes,
    )
