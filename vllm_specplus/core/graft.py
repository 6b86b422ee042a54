"""One tree from a chain and a tree, on the device; what both have is there once.

Candidates of several drafters are verified in one pass (SpecInfer, Miao et al. 2024, arXiv
2305.09781).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def graft(
    chain: torch.Tensor,  # [num_reqs, depth] int64, what follows the root
    tokens: torch.Tensor,  # [num_reqs, num_rows] int64, row 0 the root, -1 at padding
    parents: torch.Tensor,  # [num_reqs, num_rows] int64, rows
    depths: torch.Tensor,  # [num_reqs, num_rows] int64
    num_nodes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chain and below it the tree's nodes that leave it: tokens, parents [num_reqs, nodes + 1].

    What is more than `num_nodes` is cut off, the tree's last nodes first; free rows have token -1.

    >>> tree = [torch.tensor([x]) for x in ([-1, 7, 8, 9], [-1, 0, 1, 1], [0, 1, 2, 2])]
    >>> [rows.tolist() for rows in graft(torch.tensor([[7, 9]]), *tree, num_nodes=4)]
    [[[-1, 7, 9, 8, -1]], [[-1, 0, 1, 1, 0]]]
    """
    depth, parents = chain.shape[1], parents.clamp(min=0)
    chain = pad(chain, (1, 1), value=-1)
    shared = (tokens >= 0) & (tokens == chain.gather(1, depths.clamp(max=depth + 1)))
    shared[:, 0] = True
    above = parents
    for _ in range((depth - 1).bit_length()):  # shared is a node whose whole path is
        shared, above = shared & shared.gather(1, above), above.gather(1, above)
    own = (tokens >= 0) & ~shared
    row = depths.where(shared, depth + own.cumsum(1))
    place = row.where(own & (row <= num_nodes), num_nodes + 1)  # a column that is cut off
    more = (0, max(num_nodes + 1 - depth, 0))
    grafted_tokens = pad(chain[:, : depth + 1], more, value=-1)[:, : num_nodes + 2]
    rows = torch.arange(-1, depth, device=chain.device).expand(len(chain), -1)
    grafted_parents = pad(rows, more)[:, : num_nodes + 2].contiguous()
    grafted_tokens.scatter_(1, place, tokens)
    grafted_parents.scatter_(1, place, row.gather(1, parents))
    return grafted_tokens[:, :-1], grafted_parents[:, :-1]
